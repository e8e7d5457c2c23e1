"""`kvstrata init`: the file that it writes holds every key, and loads to the defaults."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_kit import assert_one_error, assert_program_error, run_program
from typer.testing import Result

from kvstrata.config import (
    Config,
    MediumFields,
    MemoryTierConfig,
    MetricsConfig,
    NvmeTierConfig,
    ServeConfig,
    SharedFsTierConfig,
    StoreConfig,
    VllmConfig,
    load_config,
)

Run = Callable[..., Result]
SECTIONS = (StoreConfig, MetricsConfig, VllmConfig, NvmeTierConfig, MemoryTierConfig)


def names(section: type) -> list[str]:
    """Its own keys, then those that every tier has but memory."""
    common = {field.name for field in dataclasses.fields(MediumFields)}
    keys = [field.name for field in dataclasses.fields(section)]
    return sorted(keys, key=common.__contains__) if issubclass(section, MediumFields) else keys


def test_default_file_is_the_default_configuration(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "kvstrata.toml"
    result = run("init", path)
    assert result.exit_code == 0
    assert f"kvstrata vllm-config --config {path}" in result.stdout
    config = load_config(path)
    assert config == Config(tiers=(NvmeTierConfig(path=config.tiers[0].path),))
    assert config.tiers[0].path


def test_every_key_is_written_active_and_with_a_comment(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "all.toml"
    assert run("init", path, "--memory-capacity", "1GiB", "--shared-path", "there").exit_code == 0
    parts = re.split(r"^(\[.*\])$", path.read_text(), flags=re.MULTILINE)
    heads = ["[[tier]]", "[[tier]]", "[[tier]]", "[store]", "[metrics]", "[serve]", "[vllm]"]
    assert parts[1::2] == heads
    bodies = parts[2::2]
    sections = (
        MemoryTierConfig,
        NvmeTierConfig,
        SharedFsTierConfig,
        StoreConfig,
        MetricsConfig,
        ServeConfig,
        VllmConfig,
    )
    for section, body in zip(sections, bodies, strict=True):
        keys = re.findall(r"^(\w+) = \S.*  # \S", body, flags=re.MULTILINE)
        assert keys == names(section)
    # No section of the configuration is left out, should one be added.
    assert {field.name for field in dataclasses.fields(Config)} == {
        "store",
        "tiers",
        "metrics",
        "serve",
        "vllm",
    }


def test_memory_example_is_a_comment_that_works(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "kvstrata.toml"
    run("init", path)
    head, example, rest = re.split(r"(# \[\[tier\]\]\n(?:# .*\n)+)", path.read_text())
    active = "".join(line.removeprefix("# ") for line in example.splitlines(keepends=True))
    path.write_text(head + active + rest)
    memory, nvme = load_config(path).tiers
    assert memory == MemoryTierConfig()
    assert isinstance(nvme, NvmeTierConfig)


@pytest.mark.parametrize(
    ("size", "written", "wanted"),
    [
        ("500GiB", '"500GiB"', 500 * 2**30),
        ("1.5TB", '"1500GB"', 1_500_000_000_000),
        ("1.5GiB", '"1536MiB"', 3 * 2**29),
        ("1073741827", "1073741827", 1_073_741_827),
    ],
)
def test_options_become_exact_values(
    run: Run, tmp_path: Path, size: str, written: str, wanted: int
) -> None:
    path = tmp_path / "x.toml"
    result = run("init", path, "--nvme-path", "/mnt/kv", "--nvme-capacity", size, "--memory-capacity", size)
    assert result.exit_code == 0
    memory, nvme = load_config(path).tiers
    assert memory == MemoryTierConfig(capacity_bytes=wanted)
    assert nvme == NvmeTierConfig(path="/mnt/kv", capacity_bytes=wanted)
    assert len(re.findall(rf"^capacity_bytes = {written} +#", path.read_text(), flags=re.MULTILINE)) == 2


@pytest.mark.parametrize("name", ['a"b', "a\\b", "tab\tend", "del\x7f", "ä \U0001f600", "#no"])
def test_any_path_survives(run: Run, tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.toml"
    assert run("init", path, "--nvme-path", f"/mnt/{name}").exit_code == 0
    assert load_config(path).tiers[0].path == f"/mnt/{name}"


def test_refuses_to_overwrite(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "kvstrata.toml"
    path.write_text("mine")
    assert_one_error(run("init", path), str(path), "--force")
    assert path.read_text() == "mine"
    assert run("init", path, "--force").exit_code == 0
    assert load_config(path).tiers


def test_default_name_in_the_current_folder(tmp_path: Path) -> None:
    result = run_program("init", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert load_config(tmp_path / "kvstrata.toml").tiers


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nvme-capacity", "banana"], ["--nvme-capacity", "banana", "1GiB"]),
        (["--nvme-capacity", "-5"], ["--nvme-capacity"]),
        (["--nvme-capacity", "0"], ["capacity_bytes", "at least 1"]),
        (["--memory-capacity", "9" * 400], ["--memory-capacity"]),
        (["--memory-capacity", "99999999999TiB"], ["--memory-capacity"]),
        (["--nvme-path", ""], ["path", "missing"]),
        (["--nvme-path", "~nosuchuser/x"], ["path", "no such user"]),
    ],
)
def test_bad_options_write_nothing(run: Run, tmp_path: Path, options: list[str], words: list[str]) -> None:
    path = tmp_path / "x.toml"
    assert_one_error(run("init", path, *options), *words)
    assert not path.exists()


def test_bad_places(run: Run, tmp_path: Path) -> None:
    assert_one_error(run("init", tmp_path / "no" / "x.toml"), "no folder")
    assert_one_error(run("init", tmp_path, "--force"), str(tmp_path))
    (tmp_path / "closed").mkdir(mode=0o500)
    assert_program_error(
        run_program("init", tmp_path / "closed" / "x.toml", unprivileged=True), "Permission denied"
    )
