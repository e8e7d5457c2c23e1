"""Which policy and what capacity for one trace, why, and the lines for kvstrata.toml.

Rules, on the usable prefix hit ratio, which is what an engine can use:

- latency: the policy with the highest ratio. Those within TIE of it count as equal; of these the ones with
  the least amplification (within AMPLIFICATION_TIE), and of these the simplest, in the order of SIMPLEST.
- bandwidth: the least amplification among policies that keep at least 1 - GIVE_UP of the highest ratio;
  within AMPLIFICATION_TIE the highest ratio, and of equal ones (TIE) the simplest.
- capacity, where none is given: the smallest of a geometric range from which on doubling it never brings
  POINT or more with lru.

The oracle is named in the reasons and never an answer. Runs simulations if it is given a workload; writes
no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvstrata.config import format_size
from kvstrata.errors import ConfigError
from kvstrata.policies import POLICIES
from kvstrata.sim.capacity import Capacity, Footprint, resolve
from kvstrata.sim.curve import lru_curve
from kvstrata.sim.metrics import RunResult
from kvstrata.sim.replay import Workload, simulate

LATENCY, BANDWIDTH = "latency", "bandwidth"
BOTTLENECKS = (LATENCY, BANDWIDTH)

TIE = 0.005
AMPLIFICATION_TIE = 0.05
GIVE_UP = 0.5
"""The study that this follows gives up 43 % of the hits for a tenth of the amplification."""
POINT = 0.01
STEPS_PER_DOUBLING = 2
DOUBLINGS = 14
"""The range reaches down to 1/16384 of the unique blocks."""
SIMPLEST = (
    "lru", "lru_forward", "sieve", "s3fifo", "twoq", "arc", "lfu_aging", "clock_pro", "mq", "gdsf", "lirs",
    "tinylfu_slru",
)  # fmt: skip
"""Few lists and no parameters first; a policy that is not here comes last."""
ORACLE = "belady"

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Advice:
    """chosen: the run whose policy, parameters and capacity are advised. runs: all live policies there,
    the highest usable prefix hit ratio first. sentences: what, why this policy, why this capacity.
    toml: lines for kvstrata.toml."""

    bottleneck: str
    chosen: RunResult
    capacity_given: bool
    runs: tuple[RunResult, ...]
    sentences: tuple[str, str, str]
    toml: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "trace": self.chosen.trace,
            "bottleneck": self.bottleneck,
            "policy": self.chosen.policy,
            "params": self.chosen.params,
            "capacity_given": self.capacity_given,
            "capacity_blocks": self.chosen.capacity_blocks,
            "capacity_bytes": self.chosen.capacity_bytes,
            "capacity_fraction": self.chosen.capacity_fraction,
            "sentences": list(self.sentences),
            "toml": self.toml,
            "runs": [run.as_dict() for run in self.runs],
        }


def advise(
    subject: Workload | Sequence[RunResult],
    bottleneck: str,
    capacity: str | None = None,
    *,
    give_up: float = GIVE_UP,
    progress: Progress | None = None,
) -> Advice:
    """Advice for one trace.

    subject: a workload, which is then simulated, or runs of one trace, of which only capacities that were
    run can be advised. capacity: as in `capacity.resolve`; None finds one. give_up: see the rules.
    progress: called with (runs done, runs). Raises ConfigError for an unknown bottleneck, a capacity that
    was not run, and runs of several traces or of none.
    """
    if bottleneck not in BOTTLENECKS:
        raise ConfigError(f"--bottleneck {bottleneck!r}: take {' or '.join(BOTTLENECKS)}")
    if not 0 <= give_up < 1:
        raise ConfigError(f"a share of {give_up} to give up: take one from 0 to below 1")
    if isinstance(subject, Workload):
        runs: _Runs = _Simulated(subject, progress)
    else:
        runs = _Stored(subject)
    place = runs.find(capacity) if capacity is not None else runs.knee()
    known = runs.at(place)
    live = sorted(
        (run for run in known if run.policy != ORACLE),
        key=lambda run: (-run.usable_prefix_hit_ratio, _simplicity(run)),
    )
    if not live:
        raise ConfigError("no run of a policy that can serve a live store at this capacity")
    oracle = next((run for run in known if run.policy == ORACLE), None)
    chosen = _latency(live) if bottleneck == LATENCY else _bandwidth(live, give_up)
    half, double = runs.beside(place, chosen)
    sentences = (
        _what(chosen, capacity is not None),
        _why_policy(bottleneck, chosen, live, oracle, give_up),
        _why_capacity(chosen, half, double, capacity is not None),
    )
    return Advice(bottleneck, chosen, capacity is not None, tuple(live), sentences, _toml(chosen))


# Choosing


def _simplicity(run: RunResult) -> tuple[int, str, int]:
    place = SIMPLEST.index(run.policy) if run.policy in SIMPLEST else len(SIMPLEST)
    return place, run.policy, len(_changed(run))


def _amplification(run: RunResult) -> float:
    return float("inf") if run.amplification is None else run.amplification


def _latency(live: Sequence[RunResult]) -> RunResult:
    best = max(run.usable_prefix_hit_ratio for run in live)
    equal = [run for run in live if run.usable_prefix_hit_ratio >= best - TIE]
    least = min(_amplification(run) for run in equal)
    cheap = [run for run in equal if _amplification(run) <= least * (1 + AMPLIFICATION_TIE)]
    return min(cheap, key=_simplicity)


def _bandwidth(live: Sequence[RunResult], give_up: float) -> RunResult:
    best = max(run.usable_prefix_hit_ratio for run in live)
    kept = [run for run in live if run.usable_prefix_hit_ratio >= best * (1 - give_up)]
    least = min(_amplification(run) for run in kept)
    cheap = [run for run in kept if _amplification(run) <= least * (1 + AMPLIFICATION_TIE)]
    most = max(run.usable_prefix_hit_ratio for run in cheap)
    return min((run for run in cheap if run.usable_prefix_hit_ratio >= most - TIE), key=_simplicity)


def knee(ratios: Mapping[int, float], steps: int = STEPS_PER_DOUBLING) -> int:
    """The smallest place from which on going up by `steps` places never brings POINT or more.

    ratios: by place 0, 1, ... of a geometric range with that many places per doubling; what lies beyond
    the range is as high as its end.
    """
    top = max(ratios)
    for place in range(top, -1, -1):
        if ratios[min(place + steps, top)] - ratios[place] >= POINT:
            return min(place + 1, top)
    return 0


# Where the runs come from


class _Runs:
    """Runs of one trace at places, which stand for capacities."""

    def find(self, capacity: str) -> Capacity:
        raise NotImplementedError

    def knee(self) -> Capacity:
        raise NotImplementedError

    def at(self, place: Capacity) -> list[RunResult]:
        raise NotImplementedError

    def beside(self, place: Capacity, chosen: RunResult) -> tuple[RunResult | None, RunResult | None]:
        """The chosen policy at half and at double the capacity."""
        raise NotImplementedError


class _Simulated(_Runs):
    """Runs that are made when they are asked for."""

    def __init__(self, workload: Workload, progress: Progress | None) -> None:
        self._workload = workload
        self._progress = progress
        self._done = 0
        self._total = len(POLICIES) + 3

    def find(self, capacity: str) -> Capacity:
        return resolve(capacity, self._workload.footprint)

    def knee(self) -> Capacity:
        footprint = self._workload.footprint
        range_ = _geometric(footprint)
        if footprint.block_bytes:
            curve = lru_curve(self._workload)
            ratios = {at: curve.usable_prefix_hit_ratio(size.blocks) for at, size in enumerate(range_)}
        else:
            self._total += len(range_)
            ratios = {at: self._run("lru", size).usable_prefix_hit_ratio for at, size in enumerate(range_)}
        return range_[knee(ratios)]

    def at(self, place: Capacity) -> list[RunResult]:
        return [self._run(policy, place) for policy in (*POLICIES, ORACLE)]

    def beside(self, place: Capacity, chosen: RunResult) -> tuple[RunResult | None, RunResult | None]:
        footprint = self._workload.footprint
        half = _scaled(place, 0.5, footprint)
        runs = [self._run(chosen.policy, size) for size in (half, _scaled(place, 2, footprint))]
        return (runs[0] if half.units < place.units else None), runs[1]

    def _run(self, policy: str, size: Capacity) -> RunResult:
        result = simulate(self._workload, policy, size)
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)
        return result


def _geometric(footprint: Footprint) -> list[Capacity]:
    """Capacities up to all unique blocks, each once."""
    places = range(DOUBLINGS * STEPS_PER_DOUBLING, -1, -1)
    return [_of_share(2.0 ** (-place / STEPS_PER_DOUBLING), footprint) for place in places]


def _of_share(share: float, footprint: Footprint) -> Capacity:
    if footprint.block_bytes:
        return resolve(f"{max(1, round(share * footprint.unique_blocks))}b", footprint)
    return resolve(f"{max(1, round(share * footprint.unique_bytes))}B", footprint)


def _scaled(place: Capacity, factor: float, footprint: Footprint) -> Capacity:
    if footprint.block_bytes:
        return resolve(f"{max(1, round(place.blocks * factor))}b", footprint)
    return resolve(f"{max(1, round(place.bytes * factor))}B", footprint)


class _Stored(_Runs):
    """Runs that are there already."""

    def __init__(self, runs: Sequence[RunResult]) -> None:
        traces = {(run.trace, run.requests, run.accesses, run.unique_blocks) for run in runs}
        if len(traces) != 1:
            names = ", ".join(sorted({run.trace for run in runs})) or "none"
            raise ConfigError(
                f"advice is for one trace, and these are runs of {len(traces)} traces: {names}"
            )
        self._sizes: dict[Capacity, list[RunResult]] = {}
        for run in runs:
            # Which of its two counts a policy was given does not matter here.
            size = Capacity(
                run.capacity_bytes, run.capacity_blocks, run.capacity_bytes, run.capacity_fraction
            )
            self._sizes.setdefault(size, []).append(run)

    def find(self, capacity: str) -> Capacity:
        for run_size, runs in self._sizes.items():
            run = runs[0]
            mean = run.capacity_bytes // max(1, run.capacity_blocks)
            footprint = Footprint(run.unique_blocks, run.unique_blocks * mean, mean)
            if resolve(capacity, footprint).blocks == run_size.blocks:
                return run_size
        known = ", ".join(f"{size.blocks}b" for size in sorted(self._sizes, key=lambda size: size.bytes))
        raise ConfigError(f"capacity {capacity}: not among these runs; there are {known}")

    def knee(self) -> Capacity:
        """As for a workload, with the nearest capacity that was run of at least the double."""
        sizes = sorted(self._sizes, key=lambda size: size.bytes)
        ratios = [self._reference(size) for size in sizes]
        for place in range(len(sizes) - 1, -1, -1):
            beyond = [n for n, size in enumerate(sizes) if size.bytes >= 2 * sizes[place].bytes]
            if beyond and ratios[beyond[0]] - ratios[place] >= POINT:
                return sizes[min(place + 1, len(sizes) - 1)]
        return sizes[0]

    def _reference(self, size: Capacity) -> float:
        """lru where it was run, else the best live policy."""
        live = [run for run in self._sizes[size] if run.policy != ORACLE]
        of = [run for run in live if run.policy == "lru"] or live
        return max((run.usable_prefix_hit_ratio for run in of), default=0.0)

    def at(self, place: Capacity) -> list[RunResult]:
        return self._sizes[place]

    def beside(self, place: Capacity, chosen: RunResult) -> tuple[RunResult | None, RunResult | None]:
        found: list[RunResult | None] = []
        for blocks in (place.blocks / 2, place.blocks * 2):
            near = [
                run
                for runs in self._sizes.values()
                for run in runs
                if (run.policy, run.params) == (chosen.policy, chosen.params)
                and abs(run.capacity_blocks - blocks) <= max(1, 0.01 * blocks)
                and run.capacity_blocks != chosen.capacity_blocks
            ]
            found.append(near[0] if near else None)
        return found[0], found[1]


# Saying it


def _percent(ratio: float) -> str:
    return f"{ratio * 100:.1f} %"


def _times(run: RunResult) -> str:
    return "no hits" if run.amplification is None else f"amplification {run.amplification:.2f}"


def _label(run: RunResult) -> str:
    changed = _changed(run)
    return (
        run.policy
        if not changed
        else f"{run.policy} ({', '.join(f'{k} {v:g}' for k, v in changed.items())})"
    )


def _what(chosen: RunResult, given: bool) -> str:
    share = chosen.capacity_blocks / max(1, chosen.unique_blocks)
    size = (
        f"{format_size(chosen.capacity_bytes)} ({chosen.capacity_blocks} blocks, {_percent(share)} of all)"
    )
    return (
        f"Take {_label(chosen)} with {size}: {_percent(chosen.usable_prefix_hit_ratio)} of the blocks "
        f"asked for are then usable prefix hits, with {_times(chosen)}."
    )


def _why_policy(
    bottleneck: str, chosen: RunResult, live: Sequence[RunResult], oracle: RunResult | None, give_up: float
) -> str:
    best = live[0]
    bound = ""
    if oracle is not None:
        bound = f"; {ORACLE}, which knows the future, has {_percent(oracle.usable_prefix_hit_ratio)}"
    count = f"of {len(live)} policies" if len(live) > 1 else "of one policy"
    if not best.usable_prefix_hit_ratio:
        return f"Nothing is usable with any {count} at this capacity, so the simplest one will do{bound}."
    if bottleneck == BANDWIDTH and chosen is not best:
        return (
            f"It writes the least per byte served among those {count} that keep {1 - give_up:.0%} of the "
            f"highest ratio, which {_label(best)} has with {_percent(best.usable_prefix_hit_ratio)} and "
            f"{_times(best)}{bound}."
        )
    if chosen is best:
        rest = [run for run in live if run is not best]
        ahead = ""
        if rest:
            ratio, label = _percent(rest[0].usable_prefix_hit_ratio), _label(rest[0])
            ahead = f", ahead of {label} with {ratio} and {_times(rest[0])}"
        also = (
            ", and no other that keeps enough of it writes clearly less" if bottleneck == BANDWIDTH else ""
        )
        return f"It has the highest ratio {count}{ahead}{also}{bound}."
    return (
        f"The highest ratio {count} is {_percent(best.usable_prefix_hit_ratio)} of {_label(best)} with "
        f"{_times(best)}, less than half a point more, and among equals less writing and then the simpler "
        f"policy wins{bound}."
    )


def _why_capacity(chosen: RunResult, half: RunResult | None, double: RunResult | None, given: bool) -> str:
    moves = []
    for run, verb in ((half, "half of it"), (double, "double")):
        if run is not None:
            points = (run.usable_prefix_hit_ratio - chosen.usable_prefix_hit_ratio) * 100
            moves.append(f"{verb} ({format_size(run.capacity_bytes)}) would bring {points:+.2f} points")
    figures = " and ".join(moves) or "neither half of it nor double was run"
    if given:
        return f"The capacity was given: {figures}."
    return f"From this capacity on, doubling it brings lru less than a point: {figures}."


def _changed(run: RunResult) -> dict[str, float]:
    knobs = POLICIES[run.policy].KNOBS if run.policy in POLICIES else {}
    return {name: value for name, value in run.params.items() if knobs.get(name) != value}


def _toml(chosen: RunResult) -> str:
    lines = [
        "[[tier]]",
        'type = "memory"  # or "nvme", with path = "..."',
        f"capacity_bytes = {chosen.capacity_bytes}  # {format_size(chosen.capacity_bytes)}",
        f'policy = "{chosen.policy}"',
    ]
    changed = _changed(chosen)
    if changed:
        lines.append(
            f"policy_options = {{ {', '.join(f'{name} = {value:g}' for name, value in changed.items())} }}"
        )
    return "\n".join(lines)
