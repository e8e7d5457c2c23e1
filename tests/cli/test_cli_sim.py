"""`kvstrata sim run | sweep | tune | advise | curve`, from the command line to the JSON."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_kit import assert_one_error, assert_program_error, run_program
from typer.testing import Result

from kvstrata.sim.replay import SIMULATED
from kvstrata.sim.results import read_results
from open_traces import OPEN

SAMPLE = Path(__file__).parents[1] / "data" / "mooncake_conversation_300.jsonl"
REAL = OPEN
WHOLE = REAL / "mooncake" / "conversation_trace.jsonl.gz"

Run = Callable[..., Result]

PROMISED = {
    "trace", "policy", "params", "capacity_fraction", "capacity_blocks", "capacity_bytes", "accesses",
    "requests", "block_hit_ratio", "usable_prefix_hit_ratio", "request_hit_ratio", "byte_hit_ratio",
    "amplification", "wasted_ratio", "evictions", "seconds",
}  # fmt: skip


def json_of(result: Result) -> object:
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


def test_run_prints_a_list_of_objects(run: Run) -> None:
    rows = json_of(
        run("sim", "run", SAMPLE, "--policy", "lru,arc", "--capacity", "1%,5000b,64GiB", "--json")
    )
    assert isinstance(rows, list) and len(rows) == 6
    assert all(row.keys() >= PROMISED for row in rows)
    assert [row["policy"] for row in rows] == ["lru"] * 3 + ["arc"] * 3
    assert [row["capacity_fraction"] for row in rows[:1]] == [0.01]
    assert [row["capacity_blocks"] for row in rows[1:3]] == [5000, 1024]
    assert {row["trace"] for row in rows} == {"mooncake_conversation_300"}
    assert {(row["requests"], row["accesses"]) for row in rows} == {(300, rows[0]["accesses"])}


def test_run_all_is_every_policy_with_the_oracle(run: Run) -> None:
    rows = json_of(run("sim", "run", SAMPLE, "--policy", "all", "--capacity", "10%", "--json"))
    assert isinstance(rows, list)
    assert [row["policy"] for row in rows] == list(SIMULATED)
    assert all(row["gap_to_belady"] >= -0.02 for row in rows)


def test_run_has_defaults_and_parameters(run: Run) -> None:
    options = ["--policy", "lru,twoq", "--set", "twoq.kin=0.5", "--block-bytes", "1MiB", "--json"]
    rows = json_of(run("sim", "run", SAMPLE, *options))
    assert isinstance(rows, list)
    assert [row["capacity_fraction"] for row in rows] == [0.01, 0.05, 0.1, 0.2] * 2
    assert rows[-1]["params"]["kin"] == 0.5 and rows[0]["params"] == {}
    assert rows[0]["capacity_bytes"] == rows[0]["capacity_blocks"] * 2**20
    table = run("sim", "run", SAMPLE, "--policy", "twoq", "--set", "kin=0.5")
    assert "twoq kin=0.5" in table.stdout and "the usable one" in table.stdout


def test_run_skips_broken_records_and_says_so_on_stderr(run: Run, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(SAMPLE.read_text() + "{oops\n")
    assert_one_error(run("sim", "run", broken), "broken.jsonl", "301")
    result = run("sim", "run", broken, "--skip-bad", "--json", "--capacity", "1%")
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)) == 1
    assert result.stderr == "broken: skipped 1 broken record\n"


def test_the_program_prints_pure_json() -> None:
    """In a process of its own, where kernels are loaded and workers might start."""
    done = run_program(
        "sim", "run", SAMPLE, "--policy", "lru,belady", "--capacity", "5%", "--json", "-j", 2
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policy", "lrv"], ["lrv", "did you mean", "lru"]),
        (["--policy", ","], ["no policy"]),
        (["--capacity", "lots"], ["lots", "64GiB"]),
        (["--capacity", "5"], ["no unit"]),
        (["--set", "lru.x=1"], ["lru", "'x'", "none"]),
        (["--set", "arc.x=1"], ["not among"]),
        (["--policy", "twoq", "--set", "kin"], ["POLICY.PARAMETER=VALUE"]),
        (["--policy", "twoq", "--set", "kin=a"], ["'a'", "number"]),
        (["--policy", "twoq", "--set", "kin=0.1,0.2"], ["sim tune"]),
        (["--policy", "twoq", "--set", "kin=7"], ["kin"]),
        (["--jobs", "0"], ["jobs"]),
        (["--block-bytes", "0"], ["--block-bytes"]),
        (["--block-bytes", "x"], ["--block-bytes"]),
        (["--format", "tape"], ["tape"]),
    ],
)
def test_wrong_use_is_one_line(run: Run, arguments: list[str], words: list[str]) -> None:
    assert_one_error(run("sim", "run", SAMPLE, *arguments), *words)


def test_a_trace_that_is_not_there() -> None:
    assert_program_error(run_program("sim", "run", "no-such.jsonl"), "no-such.jsonl")


def test_sweep_keeps_results_and_goes_on(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run("sim", "sweep", SAMPLE, "-o", out, "--policy", "lru,belady", "--capacity", "1%,10%")
    assert first.exit_code == 0, first.output
    assert "4 runs done; results in" in first.stdout and "gap to belady" in first.stdout
    both = ["sim", "sweep", SAMPLE, "-o", out, "--policy", "lru,arc,belady", "--capacity", "1%,10%"]
    second = json_of(run(*both, "--json"))
    assert isinstance(second, dict)
    assert (second["runs"], second["ran"], second["reused"]) == (6, 2, 4)
    assert {row["policy"] for row in second["headline"]} == {"lru", "arc", "belady"}
    assert all(row["gap_to_belady"] is not None and row["runs"] == 2 for row in second["headline"])
    third = run(*both)
    assert "0 runs done, 6 were there already" in third.stdout
    assert len(read_results(out)) == 6


def test_sweep_defaults_are_the_study(run: Run, tmp_path: Path) -> None:
    found = json_of(run("sim", "sweep", SAMPLE, "-o", tmp_path / "out", "--json"))
    assert isinstance(found, dict)
    assert found["runs"] == len(SIMULATED) * 6
    fractions = sorted({result.capacity_fraction for result in read_results(tmp_path / "out")})
    assert fractions == [0.001, 0.01, 0.05, 0.1, 0.2, 0.4]


def test_sweep_into_a_file_is_an_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_one_error(run("sim", "sweep", SAMPLE, "-o", tmp_path / "file"), "is a file")


def test_tune_any_grid(run: Run, tmp_path: Path) -> None:
    options = ["-o", tmp_path / "out", "--policy", "twoq", "--set", "kin=0.1,0.5", "--set", "kout=0.5,1"]
    found = json_of(run("sim", "tune", SAMPLE, *options, "--capacity", "5%", "--json"))
    assert isinstance(found, dict)
    assert len(found["variants"]) == 6 and found["ran"] == 6
    assert found["spread"]["twoq"]["lowest"] <= found["spread"]["twoq"]["highest"]
    assert {"variant", "set", "params", "block_hit_ratio"} <= found["variants"][0].keys()
    table = run("sim", "tune", SAMPLE, *options, "--capacity", "5%")
    assert "a spread of" in table.stdout and "0 runs done" in table.stdout


@pytest.mark.skipif("tinylfu_slru" not in SIMULATED, reason="needs the policies of the study")
@pytest.mark.skipif("lfu_aging" not in SIMULATED, reason="needs the policies of the study")
def test_tune_runs_the_variants_of_the_study(run: Run, tmp_path: Path) -> None:
    found = json_of(run("sim", "tune", SAMPLE, "-o", tmp_path / "out", "--capacity", "1%,5%", "--json"))
    assert isinstance(found, dict)
    assert len(found["variants"]) == 13
    assert {"lru", "arc", "tinylfu_p20_w65k", "lfu_e50k_s1"} <= {
        row["variant"] for row in found["variants"]
    }
    assert found["spread"].keys() == {"tinylfu_slru", "lfu_aging"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "kin=1"], ["--policy"]),
        (["--policy", "twoq"], ["nothing to tune", "kin (0.25)"]),
        (["--policy", "lru,arc"], ["one policy"]),
        (["--policy", "twoq", "--set", "kin=0.1", "--set", "kin=0.2"], ["twice"]),
    ],
)
def test_tune_wrong_use(run: Run, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    assert_one_error(run("sim", "tune", SAMPLE, "-o", tmp_path, *arguments), *words)


def test_advise(run: Run) -> None:
    table = run("sim", "advise", SAMPLE, "--bottleneck", "latency", "--capacity", "5%")
    assert table.exit_code == 0, table.output
    assert table.stdout.startswith("Take ") and "advised" in table.stdout and "[[tier]]" in table.stdout
    found = json_of(run("sim", "advise", SAMPLE, "--bottleneck", "bandwidth", "--give-up", "20%", "--json"))
    assert isinstance(found, dict)
    assert len(found["sentences"]) == 3 and found["policy"] != "belady"
    assert_one_error(run("sim", "advise", SAMPLE, "--bottleneck", "money"), "latency or bandwidth")
    assert_one_error(run("sim", "advise", SAMPLE), "--bottleneck")
    assert_one_error(
        run("sim", "advise", SAMPLE, "--bottleneck", "latency", "--give-up", "all"), "--give-up"
    )


def test_curve(run: Run, tmp_path: Path) -> None:
    table = run("sim", "curve", SAMPLE, "-o", tmp_path / "curve.csv")
    assert table.exit_code == 0, table.output
    assert "more capacity hits no more" in table.stdout and "wrote" in table.stdout
    rows = list(csv.DictReader((tmp_path / "curve.csv").open()))
    found = json_of(run("sim", "curve", SAMPLE, "--policy", "lru_forward", "--json"))
    assert isinstance(found, dict)
    assert float(rows[-1]["block_hit_ratio"]) == found["points"][-1]["block_hit_ratio"]
    assert_one_error(run("sim", "curve", SAMPLE, "-o", tmp_path / "curve.csv"), "--force")
    assert_one_error(run("sim", "curve", SAMPLE, "-o", tmp_path / "curve.doc"), ".csv")
    assert_one_error(run("sim", "curve", SAMPLE, "--policy", "arc"), "arc")


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    """Without joblib the work is done here; without pyarrow there is nowhere to keep results."""
    code = "import sys\nsys.modules[sys.argv.pop(1)] = None\nfrom kvstrata.cli.app import main\nmain()\n"

    def without(package: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, package, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert without("joblib", "sim", "run", SAMPLE, "--json").returncode == 0
    assert_program_error(without("joblib", "sim", "run", SAMPLE, "-j", 2), "pip install 'kvstrata[sim]'")
    sweep = ["sim", "sweep", SAMPLE, "-o", tmp_path / "out", "--policy", "lru"]
    assert_program_error(without("pyarrow", *sweep), "pip install 'kvstrata[sim]'")
    curve = ["sim", "curve", SAMPLE, "-o", tmp_path / "c.png"]
    assert_program_error(without("matplotlib", *curve), "pip install 'kvstrata[sim]'")


def test_the_reference_rows(run: Run) -> None:
    """DESIGN.md section 6."""
    if not WHOLE.exists():
        pytest.skip(f"the real traces are not there: {Path(*WHOLE.parts[-4:])} beside the repository")
    options = ["--policy", "lru_forward,arc,belady", "--capacity", "0.1%,1%,5%,10%,20%,40%", "--json"]
    rows = json_of(run("sim", "run", WHOLE, *options))
    assert isinstance(rows, list)
    ratios = [row["block_hit_ratio"] for row in rows]
    assert ratios[:6] == pytest.approx([0.042, 0.052, 0.195, 0.278, 0.345, 0.360], abs=1e-3)
    assert ratios[6:12] == pytest.approx([0.045, 0.065, 0.210, 0.284, 0.320, 0.360], abs=1e-3)
    assert ratios[12:] == pytest.approx([0.087, 0.246, 0.366, 0.366, 0.366, 0.366], abs=1e-3)


def test_evictions_of_64_mib_blocks(run: Run) -> None:
    """DESIGN.md section 6: capacities in bytes, full blocks, lru touched forward."""
    if not WHOLE.exists():
        pytest.skip(f"the real traces are not there: {Path(*WHOLE.parts[-4:])} beside the repository")
    options = ["--full-blocks", "--block-bytes", "64MiB", "--json"]
    options += ["--policy", "lru_forward", "--capacity", "64GiB,1024GiB,4096GiB"]
    rows = json_of(run("sim", "run", WHOLE, *options))
    assert isinstance(rows, list)
    assert [row["evictions"] for row in rows] == [262_433, 182_063, 107_169]


def test_two_traces_of_one_name(run: Run, tmp_path: Path) -> None:
    for day in ("mon", "tue"):
        (tmp_path / day).mkdir()
        shutil.copy(SAMPLE, tmp_path / day / "chat.jsonl")
    rows = json_of(run("sim", "run", *tmp_path.glob("*/chat.jsonl"), "--capacity", "1%", "--json"))
    assert isinstance(rows, list)
    assert {row["trace"] for row in rows} == {"mon/chat", "tue/chat"}
