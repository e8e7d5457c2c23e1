"""The store keeps its promises on the engine that is not the default here, too.

All of the tests run on either engine with `pytest --engine threads` and `pytest --engine io_uring`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstrata.transfer.file_io import FileIO, supports_direct
from kvstrata.transfer.ring import ring_refused

HERE = Path(__file__).resolve().parent
CHOSEN = [HERE / "test_store.py", HERE / "test_bound.py", HERE / "test_many_bad.py"]


@pytest.mark.slow
@pytest.mark.skipif(bool(ring_refused()), reason="threads are the default here: there is no io_uring")
def test_chosen_tests_pass_in_threads(tmp_path: Path) -> None:
    if os.environ.get("KVSTRATA_TEST_ENGINE", "auto") == "threads" or not supports_direct(
        FileIO(), tmp_path
    ):
        pytest.skip("the other tests run in threads already")
    answer = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--engine", "threads",
            "--basetemp", str(tmp_path / "inner"), *map(str, CHOSEN),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout[-5000:]
