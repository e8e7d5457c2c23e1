"""`make study` on a small real trace: the page holds the runs' figures; a second run changes nothing."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvstrata.sim.capacity import resolve
from kvstrata.sim.replay import Workload, simulate
from kvstrata.traces.open import open_trace

for package in ("matplotlib", "jinja2", "pyarrow"):
    pytest.importorskip(package, reason="pip install 'kvstrata[sim]'")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "study"
SAMPLE = ROOT / "tests" / "data" / "mooncake_conversation_300.jsonl"
POLICIES = ("lru", "lru_forward", "belady")
CAPACITIES = ("5%", "20%")


def run(folder: Path, *arguments: str, out: str = "study") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable, SCRIPT, "--traces", folder / "traces", "--capture", folder / "no-capture",
            "--results", folder / "results", "--out", folder / out, "--policies", ",".join(POLICIES),
            "--capacities", ",".join(CAPACITIES), "--jobs", "1", *arguments,
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "traces" / "mooncake").mkdir(parents=True)
    shutil.copy(SAMPLE, folder / "traces" / "mooncake" / "conversation_trace.jsonl")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_the_page_names_every_policy_with_the_figures_of_its_runs(folder: Path) -> None:
    page = (folder / "study" / "README.md").read_text()
    workload = Workload(open_trace(SAMPLE))
    for policy in POLICIES:
        runs = [simulate(workload, policy, resolve(text, workload.footprint)) for text in CAPACITIES]
        by_capacity = [f"{run.block_hit_ratio:.3f}" for run in runs]
        assert f"| {policy} | {' | '.join(by_capacity)} |" in page
        prefixes = [f"{run.usable_prefix_hit_ratio:.3f}" for run in runs]
        assert f"| {policy} | {' | '.join(prefixes)} |" in page
        mean = sum(run.block_hit_ratio for run in runs) / len(runs)
        beside = re.search(rf"^\| {policy} \| (0\.\d+) \| (0\.\d+) \|", page, re.MULTILINE)
        assert beside is not None
        seed = {"lru": "0.756", "lru_forward": "0.756", "belady": "0.827"}
        assert beside.groups() == (seed[policy], f"{mean:.3f}")
    assert "None was there. `make demo`" in page


def test_pictures_and_links_are_there(folder: Path) -> None:
    page = (folder / "study" / "README.md").read_text()
    linked = [link for link in re.findall(r"\]\(([^)#]+)", page) if not link.startswith("..")]
    assert {"pictures/hit-ratio.png", "pictures/beside-seed.png", "report.html"} <= set(linked)
    for link in linked:
        assert (folder / "study" / link).exists(), link
    for path in (folder / "study").rglob("*.png"):
        assert path.stat().st_size < 150_000


def test_tables_hold_all_runs_and_nothing_of_the_machine(folder: Path) -> None:
    with open(folder / "study" / "tables" / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["policy"] for row in rows} == set(POLICIES)
    assert len(rows) == len(POLICIES) * len(CAPACITIES)
    assert "seconds" not in rows[0]
    for name, data in content(folder / "study").items():
        assert str(folder).encode() not in data, name


def test_a_second_run_reuses_the_runs_and_changes_nothing(folder: Path) -> None:
    before = content(folder / "study")
    (folder / "study" / "tables" / "of-an-earlier-study.csv").write_text("old\n")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert "0 runs done, 6 were there" in done.stderr
    assert content(folder / "study") == before


def test_what_is_wrong_is_said_in_one_line(folder: Path) -> None:
    done = run(folder, "--traces", str(folder / "nowhere"))
    assert done.returncode == 2
    assert "give the one with the real traces" in done.stderr
    (folder / "empty").mkdir()
    done = run(folder, "--traces", str(folder / "empty"))
    assert done.returncode == 2
    assert "no traces here" in done.stderr
    (folder / "mine").mkdir()
    (folder / "mine" / "letter.txt").write_text("dear")
    done = run(folder, out="mine")
    assert done.returncode == 2
    assert "holds no study" in done.stderr
    assert content(folder / "mine") == {"letter.txt": b"dear"}
