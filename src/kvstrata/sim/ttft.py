"""Modelled time to first token: fetch what the tiers have, compute the rest, wait for both in queues.

A model, not a measurement: no engine, no scheduler, no decode. What it says, per request:

    fetch    = max over the tiers that serve it of (latency + bytes / read bandwidth)
    compute  = prefill of the tokens that no tier had
    TTFT     = fetch + compute + waiting

The tiers of one request are read at the same time, as `BlockStore.load` does with a lane per tier; fetch
and compute do not overlap. Waiting: the read side of each tier and the GPU are servers that take one
request at a time, first come first served, and requests arrive when the trace says. A request comes to
the GPU when its last tier is done. Writes use the other direction of a link and wait for nobody.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.errors import ConfigError
from kvstrata.jit import kernel
from kvstrata.policies.base import Ints

Floats = NDArray[np.float64]

GPU = "gpu"
"""The name of the compute server beside those of the tiers."""

PERCENTS = (50, 95, 99)

PREFILL_TOKENS_PER_SECOND = 20_000.0
"""Of 8 billion weights, 2 FLOP per weight and token, this is 0.32 PFLOP/s: a third of the 0.989 PFLOP/s
(dense, 16 bit) in the data sheet of an H100 SXM. An assumption that goes with 131,072 bytes per token
(Llama 3 8B); measure your own engine."""


@dataclass(frozen=True, slots=True)
class ComputeModel:
    """How long prefill takes.

    A token with c tokens before it takes (1 + c / attention_tokens) / prefill_tokens_per_second seconds, so
    n tokens behind a cached prefix of p tokens take

        (n + ((p + n)^2 - p^2) / (2 x attention_tokens)) / prefill_tokens_per_second

    attention_tokens: context at which attention costs as much as all else; 0 leaves attention out, and the
    speed is then a mean over the lengths served. Of a dense model it is weights / (2 x layers x query heads
    x head dim): 2 FLOP per weight and token against 4 per layer, query width and token of context; 30,600
    for Llama 3 8B (32 layers, 32 heads of 128).
    """

    prefill_tokens_per_second: float = PREFILL_TOKENS_PER_SECOND
    attention_tokens: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.prefill_tokens_per_second < float("inf"):
            raise ConfigError(
                f"prefill_tokens_per_second is {self.prefill_tokens_per_second:g}; take a number above 0"
            )
        if not 0 <= self.attention_tokens < float("inf"):
            raise ConfigError(f"attention_tokens is {self.attention_tokens:g}; take a number from 0")

    def seconds(self, cached: Ints, computed: Ints) -> Floats:
        """Prefill of `computed` tokens behind `cached` ones, per request."""
        work = computed.astype(np.float64)
        if self.attention_tokens:
            whole = (cached + computed).astype(np.float64)
            work += (whole**2 - cached.astype(np.float64) ** 2) / (2 * self.attention_tokens)
        return work / self.prefill_tokens_per_second


@kernel
def fcfs(arrival: Floats, service: Floats) -> Floats:
    """When each customer of one first-come-first-served server is done.

    arrival: ascending. done[i] = max(arrival[i], done[i-1]) + service[i] (Lindley, "The theory of queues
    with a single server", 1952).
    """
    done = np.empty(len(arrival))
    free = -np.inf
    for customer in range(len(arrival)):
        free = max(free, arrival[customer]) + service[customer]
        done[customer] = free
    return done


def first_token_times(arrival: Floats, fetch: Floats, visits: NDArray[np.bool_], compute: Floats) -> Floats:
    """When each request has its first token, with waiting.

    arrival: seconds, ascending. fetch: requests x tiers, seconds of service. visits: requests x tiers, who
    is served by whom. compute: seconds of service on the GPU, which takes requests in the order in which
    they come to it (those that come at one moment in the order of the trace).
    """
    ready = arrival.copy()
    for tier in range(fetch.shape[1]):
        served = np.flatnonzero(visits[:, tier])
        done = fcfs(arrival[served], np.ascontiguousarray(fetch[served, tier]))
        ready[served] = np.maximum(ready[served], done)
    order = np.argsort(ready, kind="stable")
    first = np.empty(len(arrival))
    first[order] = fcfs(ready[order], compute[order])
    return first


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of the TTFT of all requests, in seconds; between two requests they are interpolated."""

    mean_seconds: float
    p50_seconds: float
    p95_seconds: float
    p99_seconds: float

    @staticmethod
    def of(seconds: Floats) -> Percentiles:
        if not len(seconds):
            return Percentiles(0.0, 0.0, 0.0, 0.0)
        p50, p95, p99 = (float(value) for value in np.percentile(seconds, PERCENTS))
        return Percentiles(float(seconds.mean()), p50, p95, p99)


@dataclass(frozen=True, slots=True)
class Ttft:
    """One way to serve a trace.

    alone: every request as if it were the only one. queued: with waiting; None where that was not asked
    for, or where a server is asked for more than it can do, so that waiting grows as long as the trace
    does. utilisation: per server, seconds of service / seconds from the first arrival to the last; None
    where all requests arrive at once. overloaded: servers of utilisation 1 and above. *_seconds: what the
    percentiles were taken of, per request.
    """

    alone: Percentiles
    queued: Percentiles | None
    utilisation: dict[str, float | None]
    overloaded: tuple[str, ...]
    alone_seconds: Floats
    queued_seconds: Floats | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: figures, no arrays."""
        return {
            "alone": dataclasses.asdict(self.alone),
            "queued": dataclasses.asdict(self.queued) if self.queued is not None else None,
            "utilisation": self.utilisation,
            "overloaded": list(self.overloaded),
        }


@dataclass(frozen=True, slots=True)
class TtftComparison:
    """The tiers against computing every prompt whole.

    speedup_*: recompute's figure / the tiers'; None where either is unknown or 0.
    """

    cached: Ttft
    recompute: Ttft
    speedup_alone: dict[str, float | None]
    speedup_queued: dict[str, float | None] | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: figures, no arrays."""
        return {
            "cached": self.cached.as_dict(),
            "recompute": self.recompute.as_dict(),
            "speedup_alone": self.speedup_alone,
            "speedup_queued": self.speedup_queued,
        }


def compare(
    compute: ComputeModel, *, arrival: Floats, prompt_tokens: Ints, cached_tokens: Ints, fetch: Floats,
    visits: NDArray[np.bool_], tiers: Sequence[str], queue: bool,
) -> TtftComparison:  # fmt: skip
    """TTFT of every request with the tiers and without.

    arrival: seconds, ascending. prompt_tokens, cached_tokens: per request; at least one token is always
    computed, as an engine must to have a first output. fetch, visits: as in `first_token_times`. tiers: the
    names of their columns. queue: with waiting too.
    """
    computed = np.maximum(prompt_tokens - cached_tokens, 1)
    prefill = compute.seconds(np.maximum(prompt_tokens - computed, 0), computed)
    whole = compute.seconds(np.zeros_like(prompt_tokens), np.maximum(prompt_tokens, 1))
    nothing = np.zeros((len(arrival), 0))
    cached = _ttft(arrival, np.where(visits, fetch, 0.0), visits, prefill, tiers, queue)
    recompute = _ttft(arrival, nothing, nothing > 0, whole, (), queue)
    queued = None
    if cached.queued is not None and recompute.queued is not None:
        queued = _speedup(recompute.queued, cached.queued)
    return TtftComparison(cached, recompute, _speedup(recompute.alone, cached.alone), queued)


def _ttft(
    arrival: Floats, fetch: Floats, visits: NDArray[np.bool_], compute: Floats, tiers: Sequence[str],
    queue: bool,
) -> Ttft:  # fmt: skip
    alone = compute + fetch.max(axis=1, initial=0.0)
    busy = {name: float(fetch[:, tier].sum()) for tier, name in enumerate(tiers)}
    busy[GPU] = float(compute.sum())
    utilisation = {name: offered_load(seconds, arrival) for name, seconds in busy.items()}
    overloaded = tuple(name for name, load in utilisation.items() if load is None or load >= 1)
    queued = None
    if queue and not overloaded:
        queued = first_token_times(arrival, fetch, visits, compute) - arrival
    return Ttft(
        Percentiles.of(alone),
        None if queued is None else Percentiles.of(queued),
        utilisation,
        overloaded,
        alone,
        queued,
    )


def offered_load(busy_seconds: float, arrival: Floats) -> float | None:
    """Service asked for / seconds from the first arrival to the last; None if that is no time at all."""
    span = float(arrival[-1] - arrival[0]) if len(arrival) else 0.0
    if not busy_seconds:
        return 0.0
    return busy_seconds / span if span > 0 else None


def _speedup(over: Percentiles, under: Percentiles) -> dict[str, float | None]:
    return {
        name: getattr(over, f"{name}_seconds") / below
        if (below := getattr(under, f"{name}_seconds"))
        else None
        for name in ("mean", "p50", "p95", "p99")
    }
