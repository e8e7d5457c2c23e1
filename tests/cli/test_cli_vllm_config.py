"""`kvstrata vllm-config`: exactly the JSON, from a configuration that was checked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_kit import assert_one_error, assert_program_error, run_program
from typer.testing import Result

from kvstrata.config import load_config
from kvstrata.connectors.vllm.launch import kv_transfer_config

Run = Callable[..., Result]
NVME = '[[tier]]\ntype = "nvme"\npath = "/x"\n'


@pytest.fixture
def config(run: Run, tmp_path: Path) -> Path:
    path = tmp_path / "kvstrata.toml"
    assert run("init", path).exit_code == 0
    return path


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize("pretty", [True, False])
def test_prints_the_json_and_nothing_else(run: Run, config: Path, cpu: bool, pretty: bool) -> None:
    options = ["--cpu"] * cpu + ["--pretty"] * pretty
    result = run("vllm-config", "--config", config, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == kv_transfer_config(load_config(config), config, cpu=cpu)
    assert (result.stdout.count("\n") > 1) is pretty


def test_program_names_the_absolute_path(config: Path) -> None:
    result = run_program("vllm-config", "--config", config.name, cwd=config.parent)
    extra = json.loads(result.stdout)["kv_connector_extra_config"]
    assert extra["secondary_tiers"][0]["config_file"] == str(config)
    assert run_program("vllm-config", cwd=config.parent).stdout == result.stdout


def test_needs_neither_vllm_nor_numba(config: Path) -> None:
    program = (
        "import sys\n"
        "from kvstrata.cli.app import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'vllm', 'torch', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    command = [sys.executable, "-c", program, "vllm-config", "--config", str(config)]
    subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no tier", "[[tier]]"]),
        ("a =", ["not valid TOML"]),
        ("[stoer]\n", ["stoer", "'store'"]),
        ("[store]\nio_thread = 4\n", ["store.io_thread", "'io_threads'"]),
        ('[store]\nio_threads = "4"\n', ["store.io_threads", "expected int"]),
        ("[store]\nio_deadline_seconds = nan\n", ["store.io_deadline_seconds", "nan"]),
        ("[store]\nio_deadline_seconds = inf\n", ["store.io_deadline_seconds", "inf"]),
        ("[metrics]\nport = 70000\n", ["metrics.port", "65535"]),
        ("tier = 3\n", ["[[tier]]"]),
        ("[[tier]]\ntype = ['nvme']\n", ["tier[0].type"]),
        ("[[tier]]\ntype = {}\n", ["tier[0].type"]),
        ('[[tier]]\ntype = "nvm"\n', ["tier[0].type", "'nvme'"]),
        ('[[tier]]\ntype = "nvme"\n', ["tier[0].path", "missing"]),
        ('[[tier]]\ntype = "nvme"\npath = "~nosuchuser/x"\n', ["tier[0].path", "no such user"]),
        ('[[tier]]\ntype = "nvme"\npath = "a\\u0000b"\n', ["tier[0].path", "NUL"]),
        (NVME + "capacity_bytes = -1\n", ["tier[0].capacity_bytes"]),
        (NVME + "capacity_bytes = 1e9\n", ["tier[0].capacity_bytes", "not a size"]),
        (NVME + 'capacity_bytes = "10 XB"\n', ["tier[0].capacity_bytes", "10 XB", "1GiB"]),
        (NVME + f"capacity_bytes = {2**63}\n", ["tier[0].capacity_bytes", str(2**63 - 1)]),
        (NVME + f'capacity_bytes = "{"9" * 400}"\n', ["tier[0].capacity_bytes", str(2**63 - 1)]),
        (f"[store]\nevents = {'9' * 5000}\n", ["not valid TOML"]),
        ("x = " + "[" * 5000, ["nested too deeply"]),
    ],
    ids=range(22),
)
def test_bad_configurations(run: Run, tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    assert_one_error(run("vllm-config", "--config", path), "bad.toml", *words)


def test_bad_files(run: Run, tmp_path: Path) -> None:
    assert_one_error(run("vllm-config", "--config", tmp_path / "no.toml"), "no.toml", "kvstrata init")
    assert_one_error(run("vllm-config", "--config", tmp_path), str(tmp_path))
    (tmp_path / "latin.toml").write_bytes(b"# \xff\n")
    assert_one_error(run("vllm-config", "--config", tmp_path / "latin.toml"), "utf-8")
    secret = tmp_path / "secret.toml"
    secret.write_text(NVME)
    secret.chmod(0)
    assert_program_error(
        run_program("vllm-config", "--config", secret, unprivileged=True), "Permission denied"
    )
