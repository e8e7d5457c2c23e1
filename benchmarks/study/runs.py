"""The runs of the study: which traces, policies and capacities, and the results that they give.

Says nothing about the results. Everything that was run lies in the results folder and is not run again
while neither the traces nor the code that replays them changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import xxhash
from rich.console import Console

import kvstrata
from kvstrata.cli.output import ProgressBar
from kvstrata.errors import ConfigError
from kvstrata.sim.curve import lru_curve
from kvstrata.sim.curve_file import write_curve
from kvstrata.sim.grid import Cell, Params, Variant, defaults_of, run_grid, study_in_order
from kvstrata.sim.metrics import RunResult
from kvstrata.sim.report.page import read_curve
from kvstrata.sim.report.pictures import MissCurve
from kvstrata.sim.specs import TraceSpec, short_name, workload_of
from kvstrata.sim.tables import Study
from kvstrata.sim.tune import STUDY_VARIANTS
from kvstrata.traces.capture import capture_files
from kvstrata.traces.open import OpenOptions
from kvstrata.traces.stream import conversation_files

CAPACITIES = ("0.1%", "1%", "5%", "10%", "20%", "40%")
STREAM_BLOCKS = (64, 256)
"""Tokens of a block."""
STREAM_SEEDS = (1, 2, 3, 4, 5)
"""The first is the study's; the others tell how much the random order of the conversations matters."""
SEEDS_BLOCK = 256

Run = tuple[Cell, RunResult]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Length:
    """Blocks of the requests of a trace."""

    median: int
    longest: int


@dataclass(frozen=True, slots=True)
class Group:
    """Traces that are looked at together. left_out: runs whose share of the trace is less than one block;
    they are in none of the figures."""

    runs: tuple[Run, ...]
    left_out: int = 0

    @property
    def results(self) -> list[RunResult]:
        return [result for _, result in self.runs]

    @property
    def asked(self) -> list[str]:
        return [cell.capacity for cell, _ in self.runs]

    def study(self) -> Study:
        return study_in_order(self.runs)


@dataclass(frozen=True, slots=True)
class StudyRuns:
    """shared: caches that many users share. alone: every conversation with a cache of its own. seeds: the
    stream in other random orders. capture: what a live store recorded; without runs if there is none.
    lengths: of the requests of each shared trace and conversation. curves: of lru on
    the shared traces."""

    shared: Group
    alone: Group
    seeds: Group
    capture: Group
    lengths: dict[str, Length] = field(default_factory=dict)
    curves: tuple[MissCurve, ...] = ()


def shared_specs(traces: Path) -> list[TraceSpec]:
    """Mooncake's logs, and the stream of the conversations at both block sizes."""
    mooncake = traces / "mooncake"
    logs = sorted(path for path in mooncake.glob("*.jsonl*") if path.is_file())
    specs = [TraceSpec(f"mooncake {short_name(path).removesuffix('_trace')}", path) for path in logs]
    if (traces / "agentic").is_dir():
        specs += [_stream(traces, tokens, STREAM_SEEDS[0]) for tokens in STREAM_BLOCKS]
    if not specs:
        raise ConfigError(
            f"{traces}: no traces here; give a folder with mooncake/*.jsonl.gz and agentic/*.json.gz "
            "(`make study TRACES=DIR`, or --traces DIR)"
        )
    return specs


def _stream(traces: Path, tokens: int, seed: int) -> TraceSpec:
    name = f"agentic, {tokens} tokens" + ("" if seed == STREAM_SEEDS[0] else f", seed {seed}")
    return TraceSpec(name, traces / "agentic", "stream", OpenOptions(block_tokens=tokens, seed=seed))


def alone_specs(traces: Path) -> list[TraceSpec]:
    if not (traces / "agentic").is_dir():
        return []
    return [TraceSpec(short_name(path), path) for path in conversation_files(traces / "agentic")]


def seed_specs(traces: Path) -> list[TraceSpec]:
    if not (traces / "agentic").is_dir():
        return []
    return [_stream(traces, SEEDS_BLOCK, seed) for seed in STREAM_SEEDS]


def capture_specs(capture: Path, results: Path) -> list[TraceSpec]:
    """One trace of what a live store recorded, if it did."""
    if not capture.is_dir() or not capture_files(capture):
        return []
    from kvstrata.traces.capture_merge import merge_captures  # noqa: PLC0415 (an extra)

    merged = results / "traces" / "capture.parquet"
    merged.parent.mkdir(parents=True, exist_ok=True)
    merge_captures([capture], merged)
    return [TraceSpec("demo capture", merged)]


def variants_of(policies: Sequence[str], tuning: bool) -> list[Variant]:
    """Each policy as it is, and the parameters of the published study; none twice."""
    chosen: dict[tuple[str, tuple[tuple[str, float], ...]], Params] = {(name, ()): {} for name in policies}
    for variant in STUDY_VARIANTS if tuning else ():
        if variant.policy in policies:
            defaults = defaults_of(variant.policy)
            changed = {name: value for name, value in variant.params.items() if defaults[name] != value}
            chosen[variant.policy, tuple(sorted(changed.items()))] = changed
    return [(policy, params) for (policy, _), params in chosen.items()]


def code_digest() -> str:
    """Changes with the code whose figures these are: 8 letters."""
    root = Path(kvstrata.__file__).parent
    digest = xxhash.xxh3_64()
    for folder in ("policies", "sim", "traces"):
        for path in sorted((root / folder).glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def run_study(
    traces: Path,
    capture: Path,
    results: Path,
    *,
    policies: Sequence[str],
    capacities: Sequence[str] = CAPACITIES,
    jobs: int | None = None,
) -> StudyRuns:
    """Run what is not in the folder yet. Raises ConfigError, TraceFormatError and OSError."""
    if not traces.is_dir():
        raise ConfigError(
            f"{traces}: no such folder; give the one with the real traces (mooncake/*.jsonl.gz and "
            "agentic/*.json.gz): `make study TRACES=DIR`, or --traces DIR"
        )
    say = Console(stderr=True, highlight=False).print
    shared = shared_specs(traces)
    folder = results / code_digest()

    def group(title: str, specs: Sequence[TraceSpec], tuning: bool) -> Group:
        if not specs:
            return Group(())
        chosen = variants_of(policies, tuning)
        with ProgressBar(title, "runs") as progress:
            grid = run_grid(specs, chosen, capacities, out=folder, jobs=jobs, progress=progress)
        say(f"{title}: {len(specs)} traces, {grid.ran} runs done, {grid.reused} were there")
        # Parameters of stored runs are floats; all of them, so that it does not show which were stored.
        same = [replace(run, params={k: float(v) for k, v in run.params.items()}) for run in grid.results]
        pairs = list(zip(grid.cells, same, strict=True))
        kept = tuple((cell, run) for cell, run in pairs if run.capacity_fraction * run.unique_blocks >= 1)
        return Group(kept, len(pairs) - len(kept))

    alone = alone_specs(traces)
    return StudyRuns(
        shared=group("shared caches", shared, True),
        alone=group("conversations alone", alone, True),
        seeds=group("other random orders", seed_specs(traces), False),
        capture=group("what a live store recorded", capture_specs(capture, folder), False),
        lengths={spec.name: _length(spec) for spec in (*shared, *alone)},
        curves=tuple(_curve(spec, folder, say) for spec in shared),
    )


def _length(spec: TraceSpec) -> Length:
    starts = [np.diff(batch.starts) for batch in workload_of(spec).source.batches()]
    blocks = np.concatenate(starts)
    return Length(int(np.median(blocks)), int(blocks.max()))


def _curve(spec: TraceSpec, folder: Path, say: Say) -> MissCurve:
    """Of lru, kept in the folder."""
    path = folder / "curves" / f"{spec.digest()}.json"
    if not path.exists():
        write_curve(lru_curve(workload_of(spec)), path)
        say(f"lru at every capacity: {spec.name}")
    return read_curve(path)._replace(trace=spec.name)
