"""Importing kvstrata is light, and everything that it promises is there."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import kvstrata

HEAVY = ["torch", "vllm", "sglang", "obstore", "nixl", "lightgbm", "matplotlib"]


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    [
        "import kvstrata",
        "from kvstrata import BlockStore",
        "from kvstrata import *",
        "import kvstrata.connectors",
        "import kvstrata.connectors.vllm",
        "import kvstrata.metrics",
    ],
)
def test_no_engine_or_accelerator_is_loaded(statement: str) -> None:
    loaded = modules_after(statement)
    assert "kvstrata" in loaded
    assert [name for name in HEAVY if name in loaded] == []


def test_the_package_alone_loads_none_of_its_parts() -> None:
    loaded = modules_after("import kvstrata")
    assert [name for name in loaded if name.startswith("kvstrata.")] == []
    assert not loaded & {"numpy", "numba", "blake3", "xxhash"}


def test_the_names_resolve_and_are_sorted() -> None:
    assert kvstrata.__all__ == sorted(set(kvstrata.__all__))
    for name in kvstrata.__all__:
        value = getattr(kvstrata, name)
        assert getattr(value, "__name__", name) == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = kvstrata.no_such_name


def test_every_error_is_one_of_ours() -> None:
    names = [name for name in kvstrata.__all__ if name.endswith("Error")]
    assert len(names) > 5
    assert all(issubclass(getattr(kvstrata, name), kvstrata.KVStrataError) for name in names)
