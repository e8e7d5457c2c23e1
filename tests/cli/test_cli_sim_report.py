"""`kvstrata sim report`: results in, a folder out; errors are one line that says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_kit import assert_program_error, run_program

from kvstrata.sim.capacity import resolve
from kvstrata.sim.replay import Workload, simulate
from kvstrata.sim.results import write_results
from kvstrata.traces.open import open_trace

pytest.importorskip("matplotlib", reason="pip install 'kvstrata[sim]'")
pytest.importorskip("jinja2", reason="pip install 'kvstrata[sim]'")

SAMPLE = Path(__file__).parent.parent / "data" / "mooncake_conversation_300.jsonl"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    workload = Workload(open_trace(SAMPLE), "chat")
    for policy in ("lru", "belady"):
        runs = [
            simulate(workload, policy, resolve(capacity, workload.footprint)) for capacity in ("1%", "10%")
        ]
        write_results(folder / f"{policy}.parquet", runs)
    return folder


def test_a_folder_of_results_becomes_a_report(results: Path, tmp_path: Path) -> None:
    run = run_program("sim", "report", results, "-o", tmp_path / "out", "--title", "Chat <1>")
    assert (run.returncode, run.stderr) == (0, "")
    assert "4 runs" in run.stdout and "report.html" in run.stdout and "headline.csv" in run.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h1>Chat &lt;1&gt;</h1>" in page
    again = run_program("sim", "report", results, "-o", tmp_path / "out")
    assert_program_error(again, "report.html exists", "--force")
    assert (tmp_path / "out" / "report.html").read_text() == page


def test_json_names_the_files_and_a_run_counts_once(results: Path, tmp_path: Path) -> None:
    curve = tmp_path / "curve.json"
    made = run_program("sim", "curve", SAMPLE, "-o", curve)
    assert made.returncode == 0, made.stderr
    run = run_program(
        "sim", "report", results, results / "lru.parquet", "-o", tmp_path, "--curve", curve, "--json"
    )
    told = json.loads(run.stdout)
    assert told["runs"] == 4
    assert told["page"] == str(tmp_path / "report.html")
    assert all(Path(file).exists() for file in told["files"])
    assert (tmp_path / "miss-ratio.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["nowhere", "no such file"]),
        (["."], ["no results here", "kvstrata sim sweep"]),
        ([SAMPLE], ["mooncake_conversation_300.jsonl", "not a Parquet file"]),
    ],
    ids=["missing", "empty", "other"],
)
def test_what_is_no_result_is_one_line(arguments: list[object], words: list[str], tmp_path: Path) -> None:
    run = run_program("sim", "report", *arguments, "-o", tmp_path / "out", cwd=tmp_path)
    assert_program_error(run, *words)
    assert not (tmp_path / "out").exists()


def test_what_is_no_curve_is_one_line(results: Path, tmp_path: Path) -> None:
    run = run_program("sim", "report", results, "-o", tmp_path / "out", "--curve", SAMPLE)
    assert_program_error(run, SAMPLE.name, "kvstrata sim curve")
