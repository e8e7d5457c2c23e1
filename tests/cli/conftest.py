"""Fixtures of the command line's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_kit import Folder, make_folder
from typer.testing import CliRunner, Result

from kvstrata.cli.app import app


@pytest.fixture(autouse=True)
def width_of_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output as it is in a pipe, whatever terminal (or runner of tests) this is started from."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Forty blocks after a clean close."""
    return make_folder(tmp_path / "kv")


@pytest.fixture
def run() -> Callable[..., Result]:
    """The command line in this process."""

    def call(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return call
