"""`kvstrata trace`: figures, conversions and streams as a person meets them, and what it refuses."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import Result

from kvstrata.traces.builder import TraceBuilder
from kvstrata.traces.open import open_trace
from kvstrata.traces.summary import summarize
from kvstrata.traces.trace import Trace

SAMPLE = Path(__file__).parents[1] / "data" / "mooncake_conversation_300.jsonl"

Run = Callable[..., Result]


def make_conversations(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    for number in range(count):
        requests: list[Any] = [
            {"t": 60.0 * n, "model": "m", "in": 300, "out": 5, "stop": "", "hash_ids": [1, 2, 3, n + 4]}
            for n in range(4)
        ]
        content = {"block_size": 64, "hash_id_scope": "local", "tool_tokens": 130, "requests": requests}
        (folder / f"{number}.json").write_text(json.dumps(content))
    return folder


def figures(run: Run, *arguments: object) -> dict[str, Any]:
    result = run("trace", "info", "--json", *arguments)
    assert result.exit_code == 0, result.output
    only: dict[str, Any]
    (only,) = json.loads(result.output)["traces"]
    return only


def test_info(run: Run) -> None:
    seen = figures(run, SAMPLE, "--bytes-per-token", "1KiB")
    assert (seen["requests"], seen["accesses"], seen["unique"]) == (300, 8490, 7814)
    assert seen["reuse"] == pytest.approx(1 - 7814 / 8490, abs=1e-6)
    assert (seen["block_tokens"], seen["block_bytes"]) == (512, 512 * 1024)
    assert seen["accessed_bytes"] == 8490 * 512 * 1024
    assert seen["unique_bytes"] == 7814 * 512 * 1024
    assert (seen["sessions"], seen["tenants"], seen["format"]) == (0, 0, "mooncake")
    text = run("trace", "info", SAMPLE, SAMPLE)
    assert text.exit_code == 0
    for part in ("mooncake_conversation_300.jsonl", "7814", "0.0796", "request blocks p99"):
        assert text.output.count(part) >= 1


def reference_gap(trace: Trace) -> float:
    last: dict[int, float] = {}
    gaps = []
    for number, time_s in enumerate(trace.time_s.tolist()):
        for block in trace.ids[trace.starts[number] : trace.starts[number + 1]].tolist():
            if block in last:
                gaps.append(time_s - last[block])
            last[block] = time_s
    return float(np.quantile(gaps, 0.5, method="inverted_cdf"))


@pytest.mark.parametrize("seed", range(4))
def test_the_figures_against_plain_python(seed: int) -> None:
    rng = np.random.default_rng(seed)
    builder = TraceBuilder("t", "f", 1, 10)
    for time_s in np.cumsum(rng.exponential(10.0, 200)):
        chain = rng.integers(0, 40) * 100 + np.arange(rng.integers(0, 30))
        builder.add(time_s, chain, session=int(rng.integers(5)))
    trace = builder.build()
    lengths = np.diff(trace.starts)
    for max_accesses in (1, 64, 10**9):
        seen = summarize(_Batched(trace, max_accesses))
        assert seen.request_blocks_p50 == np.quantile(lengths, 0.5, method="inverted_cdf")
        assert seen.request_blocks_p99 == np.quantile(lengths, 0.99, method="inverted_cdf")
        assert seen.reuse_gap_s_p50 == pytest.approx(reference_gap(trace), rel=0.0025)
        assert seen.accessed_bytes == 10 * len(trace.ids)
        assert seen.unique_bytes == 10 * trace.head.unique
        assert seen.sessions == 5
        assert seen.duration_s == trace.time_s[-1]


class _Batched:
    def __init__(self, trace: Trace, max_accesses: int) -> None:
        self.head = trace.head
        self._trace, self._max_accesses = trace, max_accesses

    def batches(self, max_accesses: int = 0) -> Any:
        return self._trace.batches(self._max_accesses)


def test_nothing_comes_back() -> None:
    builder = TraceBuilder("t", "f", 1, 10)
    builder.add(0, [1, 2])
    assert summarize(builder.build()).reuse_gap_s_p50 is None


def test_convert(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "x.parquet"
    result = run("trace", "convert", SAMPLE, "-o", output)
    assert result.exit_code == 0, result.output
    assert "300 requests, 8490 accesses, 7814 unique blocks" in result.output
    assert figures(run, output) | {"trace": ""} == figures(run, SAMPLE) | {"trace": ""}


def test_convert_for_libcachesim(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "x.oracleGeneral"
    assert (
        run(
            "trace", "convert", SAMPLE, "--to", "oracleGeneral", "--block-bytes", "1MiB", "-o", output
        ).exit_code
        == 0
    )
    assert output.stat().st_size == 8490 * 24
    assert figures(run, output)["unique"] == 7814


def test_stream(run: Run, tmp_path: Path) -> None:
    folder = make_conversations(tmp_path / "conversations")
    for name in ("a", "b"):
        result = run(
            "trace", "stream", "--agentic", folder, "--seed", 4, "--mean-arrival", 10,
            "--block-tokens", 64, "-o", tmp_path / name,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert "12 requests, 48 accesses, 17 unique blocks" in result.output  # 2 shared, 3 x (1 + 4) own
    seen = figures(run, tmp_path / "a")
    assert (seen["sessions"], seen["tenants"], seen["block_tokens"]) == (3, 3, 64)
    one, other = (next(iter(open_trace(tmp_path / name).batches())) for name in ("a", "b"))
    assert (one.time_s == other.time_s).all() and (one.ids == other.ids).all()


def test_nothing_is_replaced_without_being_told(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "x.parquet"
    output.write_text("precious")
    result = run("trace", "convert", SAMPLE, "-o", output)
    assert result.exit_code == 2 and "--force" in result.stderr
    assert output.read_text() == "precious"
    assert run("trace", "convert", SAMPLE, "-o", output, "--force").exit_code == 0
    result = run("trace", "convert", output, "-o", output, "--force")
    assert result.exit_code == 2 and "the trace itself" in result.stderr
    assert figures(run, output)["requests"] == 300


def test_broken_records_are_counted(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(SAMPLE.read_bytes() + b"{broken\n{}\n"))
    result = run("trace", "info", path)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {path}, line 301: ") and "--skip-bad" in result.stderr
    result = run("trace", "convert", path, "--skip-bad", "-o", tmp_path / "x")
    assert result.exit_code == 0 and "skipped 2 broken records" in result.output
    assert figures(run, tmp_path / "x")["skipped"] == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["info"], "Missing argument"),
        (["info", "/no/such/trace"], "/no/such/trace: No such file"),
        (["info", "{t}"], "no trace of a known format"),
        (["info", "{s}", "--format", "tar"], "no trace format 'tar'"),
        (["info", "{s}", "--block-bytes", "3 pounds"], "--block-bytes: '3 pounds' is not a size"),
        (["info", "{s}", "--block-bytes", "0"], "--block-bytes: take at least one byte"),
        (["info", "{s}", "--block-tokens", "16"], "--block-tokens"),
        (["convert", "{s}"], "Missing option"),
        (["convert", "{s}", "-o", "{d}"], "is a folder"),
        (["convert", "{s}", "-o", "{d}/no/x"], "No such file"),
        (["convert", "{s}", "-o", "{d}/x", "--to", "zip"], "--to zip"),
        (["stream", "--agentic", "{d}", "-o", "{d}/x"], "no agentic conversations"),
        (["stream", "--agentic", "{s}", "-o", "{d}/x"], "no folder"),
        (["capture"], "Missing argument"),
        (["record"], "No such command"),
    ],
)
def test_wrong_use_is_one_line(run: Run, tmp_path: Path, arguments: list[str], told: str) -> None:
    (tmp_path / "text").write_text("not a trace\n")
    places = {"t": tmp_path / "text", "s": SAMPLE, "d": tmp_path}
    result = run("trace", *(argument.format(**places) for argument in arguments))
    assert result.exit_code == 2
    assert told in result.stderr and result.stderr.count("\n") == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["text"]


@pytest.mark.parametrize("command", [[], ["info"], ["convert"], ["stream"]])
def test_help_has_examples(run: Run, command: list[str]) -> None:
    result = run("trace", *command, "--help")
    assert result.exit_code == 0 and "Examples:" in result.output
