"""Printing: safe text, ages, and a progress bar that only a person sees."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from kvstrata.cli.output import format_age, one_line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.9, "59 s"), (60, "1 min 0 s"), (4000, "1 h 6 min"), (200_000, "2 d 7 h"), (-3, "0 s")],
)
def test_ages(seconds: float, text: str) -> None:
    assert format_age(seconds) == text


def test_one_line_keeps_text_and_nothing_else() -> None:
    assert one_line("ä 1\n2\t3") == "ä 1 2 3"
    assert (
        one_line("\x1b[31m\udcff\x00") == "\N{REPLACEMENT CHARACTER}[31m" + "\N{REPLACEMENT CHARACTER}" * 2
    )


SLOW = """
import time
from kvstrata.cli import output
output.PROGRESS_AFTER_SECONDS = {after}
with output.ProgressBar("reading") as progress:
    for done in range(5):
        time.sleep(0.02)
        progress(done, 5)
print("the result")
"""


@pytest.mark.parametrize(("after", "shown"), [(0.03, True), (60, False)])
def test_progress_is_on_stderr_of_a_terminal_and_only_if_slow(after: float, shown: bool) -> None:
    terminal, stderr = pty.openpty()
    try:
        result = subprocess.run(
            [sys.executable, "-c", SLOW.format(after=after)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            timeout=60,
            check=True,
            env=os.environ | {"TERM": "xterm"},
        )
        os.close(stderr)
        seen = b""
        try:
            while part := os.read(terminal, 65536):
                seen += part
        except OSError:
            pass  # Linux ends a pty so
    finally:
        os.close(terminal)
    assert result.stdout == "the result\n"
    assert (b"reading" in seen) is shown


def test_progress_is_silent_where_nobody_watches() -> None:
    command = [sys.executable, "-c", SLOW.format(after=0)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert (result.stdout, result.stderr) == ("the result\n", "")
