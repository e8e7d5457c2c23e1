"""`kvstrata sim tiers`: what it says of real requests, how tiers are written, and its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_kit import assert_one_error
from typer.testing import CliRunner, Result

from kvstrata.cli.app import app
from kvstrata.cli.sim_tiers import wanted_tiers
from kvstrata.config import parse_config
from kvstrata.errors import ConfigError

SAMPLE = Path(__file__).parents[1] / "data" / "mooncake_conversation_300.jsonl"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["sim", "tiers", *map(str, arguments)], env={"COLUMNS": "160"})


def figures(*arguments: object) -> dict[str, Any]:
    result = call(SAMPLE, *arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_tables_for_people() -> None:
    result = call(
        SAMPLE, "--tier", "memory,capacity=5%", "--tier", "nvme,capacity=100%,policy=arc",
        "--prefill-tokens-per-second", "200000",
    )  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, "")
    for words in (
        "mooncake_conversation_300: 300 requests",
        "write_mode back, promote on, sources computed",
        "tiers\n", "links\n", "modelled TTFT, seconds\n", "times faster", "with the tiers: busy memory",
    ):  # fmt: skip
        assert words in result.stdout
    assert "no queued TTFT" not in result.stdout


def test_json_is_the_same_run() -> None:
    found = figures(
        "--tier", "memory,capacity=5%", "--tier", "shared_fs,capacity=100%,latency=3ms,read=2GB/s"
    )
    assert [tier["name"] for tier in found["tiers"]] == ["memory", "shared_fs"]
    assert found["links_of"]["shared_fs"] == {
        "read_bytes_per_second": 2e9, "write_bytes_per_second": 5e9, "latency_seconds": 0.003,
    }  # fmt: skip
    last = found["tiers"][-1]
    assert last["usable_prefix_hit_ratio"] == found["usable_prefix_hit_ratio"] > 0
    assert last["block_hit_ratio"] == pytest.approx(1 - found["unique_blocks"] / found["accesses"])
    ttft = found["ttft"]
    assert ttft["cached"]["alone"]["p50_seconds"] <= ttft["recompute"]["alone"]["p50_seconds"]


def test_without_tiers_there_are_memory_and_nvme() -> None:
    found = figures()
    assert [tier["name"] for tier in found["tiers"]] == ["memory", "nvme"]
    assert found["tiers"][0]["capacity_bytes"] == 64 * 2**30


def test_an_overload_is_said() -> None:
    result = call(SAMPLE, "--prefill-tokens-per-second", "1000")
    assert result.exit_code == 0
    assert result.stdout.count("more than gpu can do") == 2
    assert "queued " not in result.stdout.split("modelled TTFT")[1].split("busy")[0]
    alone = call(SAMPLE, "--prefill-tokens-per-second", "200000", "--no-queue")
    assert "queued" not in alone.stdout and "no waiting" in alone.stdout


def test_a_slow_link_is_said() -> None:
    result = call(SAMPLE, "--tier", "memory,capacity=5%", "--tier", "nvme,write=1MB/s")
    assert "nvme: its link is too slow" in result.stdout


def test_a_configuration(tmp_path: Path) -> None:
    config = tmp_path / "kvstrata.toml"
    config.write_text(
        '[[tier]]\ntype = "memory"\ncapacity_bytes = "4GiB"\npromote = false\n'
        '[[tier]]\ntype = "nvme"\npath = "kv"\ncapacity_bytes = "20GiB"\npolicy = "arc"\n'
    )
    found = figures("--config", config, "--tier", "nvme,latency=1ms", "--tier", "shared_fs,capacity=100%")
    assert [(tier["name"], tier["policy"]) for tier in found["tiers"]] == [
        ("memory", "lru"), ("nvme", "arc"), ("shared_fs", "lru")
    ]  # fmt: skip
    assert found["tiers"][1]["capacity_bytes"] == 20 * 2**30
    assert found["links_of"]["nvme"]["latency_seconds"] == 0.001
    assert found["promote"] is False
    assert not (tmp_path / "kv").exists()


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "tiers.png"
    speed = ("--prefill-tokens-per-second", "200000")
    result = call(SAMPLE, "--tier", "memory,capacity=5%", "--tier", "nvme", "-o", path, *speed)
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"wrote {path}" in result.stdout
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 20_000
    assert_one_error(call(SAMPLE, "-o", path), "exists", "--force")
    assert call(SAMPLE, "-o", path, "--force", "--no-queue", *speed).exit_code == 0
    assert path.read_bytes() != data
    assert_one_error(call(SAMPLE, "-o", tmp_path / "tiers.jpeg"), ".png")


def test_a_picture_of_blocks_that_are_no_tokens(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log = tmp_path / "log.csv"
    log.write_text("0,1,4096\n1,2,4096\n2,1,4096\n")
    path = tmp_path / "tiers.svg"
    columns = ("--csv-columns", "time-col=1,obj-id-col=2,obj-size-col=3")
    result = call(
        log, *columns, "--format", "libcachesim-csv", "--tier", "memory,capacity=100%", "-o", path
    )
    assert (result.exit_code, result.stderr) == (0, "")
    assert "no TTFT" in result.stdout
    assert path.read_text().startswith("<?xml")


def test_matplotlib_stays_out_until_a_picture_is_drawn() -> None:
    code = (
        "import sys; from kvstrata.cli import sim_tiers; import kvstrata.sim.report.tiers_picture;"
        "print('matplotlib' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "False"


def test_how_a_tier_is_written() -> None:
    wanted = wanted_tiers(
        ["memory, capacity=2GiB, promote=off, write_mode=through", "nvme,bandwidth=3.5 GB/s,latency=80us"],
        None, "",
    )  # fmt: skip
    memory, nvme = wanted.tiers
    assert (wanted.promote, wanted.write_mode, memory.capacity) == (False, "through", "2GiB")
    assert (nvme.read_bytes_per_second, nvme.write_bytes_per_second) == (3.5e9, 3.5e9)
    assert nvme.latency_seconds == pytest.approx(80e-6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("disk", "no kind of tier"),
        ("nvm", "did you mean 'nvme'"),
        ("nvme,capactiy=1GiB", "did you mean 'capacity'"),
        ("nvme,policy=lur", "did you mean 'lru'"),
        ("nvme,latency=5", "latency"),
        ("nvme,bandwidth=100Gb/s", "bytes per second"),
        ("nvme,bandwidth=fast", "bytes per second"),
        ("nvme,capacity", "key=value"),
        ("nvme,read=1GB/s,read=2GB/s", "twice"),
        ("memory,promote=maybe", "on or off"),
        ("memory,write_mode=never", "back or through"),
    ],
)
def test_a_tier_that_cannot_be(text: str, words: str) -> None:
    assert_one_error(call(SAMPLE, "--tier", text), words)


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    assert_one_error(call(SAMPLE, "--tier", "nvme", "--tier", "nvme"), "once")
    assert_one_error(call(SAMPLE, "--tier", "memory", "--tier", "nvme,promote=on"), "first tier")
    assert_one_error(call(SAMPLE, "--tier", "memory,capacity=lots"), "capacity")
    assert_one_error(call(SAMPLE, "--sources", "some"), "computed, whole")
    assert_one_error(call(SAMPLE, "--prefill-tokens-per-second", "0"), "above 0")
    assert_one_error(call(tmp_path / "none"), "none")
    assert_one_error(call(SAMPLE, "--config", tmp_path / "none.toml"), "none.toml")
    with pytest.raises(ConfigError, match="no \\[\\[tier\\]\\]"):
        wanted_tiers((), parse_config({}), "kvstrata.toml")


def test_help_has_the_defaults_of_every_kind() -> None:
    from kvstrata.config import format_size
    from kvstrata.sim.tiers import TIER_DEFAULTS

    text = call("--help").stdout
    for kind, spec in TIER_DEFAULTS.items():
        row = next(line.split() for line in text.splitlines() if line.split()[:1] == [kind])
        assert row[1] == spec.capacity
        assert row[2:4] == [
            f"{speed / 1e9:g}GB/s" for speed in (spec.read_bytes_per_second, spec.write_bytes_per_second)
        ]
        unit = {"us": 1e-6, "ms": 1e-3}[row[4][-2:]]
        assert float(row[4][:-2]) * unit == pytest.approx(spec.latency_seconds)
    assert format_size(2**30) == "1.0 GiB"
