"""The program as a whole: help, version, usage errors, light imports, Ctrl-C."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest
from cli_kit import PROGRAM, assert_one_error, assert_program_error, run_program
from typer.testing import Result

import kvstrata

COMMANDS = ("init", "prepare", "inspect", "verify", "stats", "vllm-config")


def test_help_lists_every_command(run: Callable[..., Result]) -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in COMMANDS)
    assert run().stdout == result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_examples_that_name_it(run: Callable[..., Result], command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    examples = result.stdout.split("Examples:")[1]
    assert f"kvstrata {command}" in examples


def test_version() -> None:
    result = run_program("--version")
    assert (result.returncode, result.stdout) == (0, f"kvstrata {kvstrata.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspct"], ["inspct", "inspect", "kvstrata --help"]),
        (["--nope"], ["--nope"]),
        (["init", "--nope"], ["--nope", "kvstrata init --help"]),
        (["inspect"], ["DIR", "kvstrata inspect --help"]),
        (["verify", "a", "b"], ["b", "kvstrata verify --help"]),
        (["stats", "a", "b"], ["b"]),
        (["vllm-config", "x.toml"], ["x.toml"]),
        (["init", "--nvme-capacity"], ["--nvme-capacity"]),
    ],
)
def test_usage_errors_are_one_line(
    run: Callable[..., Result], arguments: list[str], words: list[str]
) -> None:
    assert_one_error(run(*arguments), *words)


def test_usage_error_of_the_program() -> None:
    assert_program_error(run_program("inspect", "--jsno", "x"), "--jsno")


def test_an_error_stays_one_line_whatever_a_path_holds(run: Callable[..., Result]) -> None:
    assert_one_error(run("inspect", "no\nsuch\x1b[31m"), "no such")


def test_help_and_vllm_config_load_nothing_heavy() -> None:
    program = (
        "import sys; from kvstrata.cli.app import app\n"
        "heavy = {'numba', 'numpy', 'torch', 'vllm', 'rich', 'prometheus_client'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_interrupt_ends_with_130_and_no_traceback() -> None:
    # A shell that runs tests in the background ignores SIGINT, and its children inherit that.
    listen = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = subprocess.Popen(
            [sys.executable, "-c", listen, str(PROGRAM), "stats", f"127.0.0.1:{silent.getsockname()[1]}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        silent.settimeout(30)
        with silent.accept()[0] as connection:
            connection.recv(1)  # the program has sent its request and waits for an answer
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stdout == "" and "Traceback" not in stderr


def test_a_closed_pipe_is_no_traceback() -> None:
    result = subprocess.run(
        f"'{PROGRAM}' vllm-config --help | true; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in result.stderr
