"""A policy with other than its default parameters against its slow reference, and against itself scaled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from contracts.policy import Call, random_calls
from kvstrata.policies import make_policy
from kvstrata.policies.base import HIT
from reference import REFERENCES


def assert_agrees(name: str, seed: int, *, equal_sizes: bool, **knobs: float) -> None:
    """The same hits, victims in the same order, the same order of the residents, after every call."""
    rng = np.random.default_rng(seed)
    ids, capacity = 60, 20 if equal_sizes else 90
    sizes = np.ones(ids, np.int64) if equal_sizes else rng.integers(1, 10, ids)
    pins = np.zeros(ids, np.int32)
    real = make_policy(name, ids, capacity, **knobs)
    make: Callable[..., Any] = REFERENCES[name]
    plain = make(capacity, **knobs)
    for request, call in enumerate(random_calls(rng, ids, capacity, 600)):
        _step(call, request, real, plain, sizes, pins)
        assert real.order().tolist() == plain.order()
        assert [index for index in range(ids) if plain.known(index)] == np.flatnonzero(real.where).tolist()


def _step(call: Call, request: int, real: Any, plain: Any, sizes: Any, pins: Any) -> None:
    array = np.array(call.ids, np.int32)
    if call.kind == "access":
        admit = np.array(call.admit, np.bool_)
        answer = real.access(array, admit, sizes, pins, request)
        expected = plain.access(call.ids, call.admit, sizes, pins, request)
        assert (answer.outcome == HIT).tolist() == expected.hits
        left = [item for item in dict.fromkeys(expected.evicted) if not plain.resident(item)]
        assert answer.evicted.tolist() == left
    elif call.kind == "remove":
        pins[array] = 0
        real.remove(array, sizes)
        plain.remove(call.ids)
    elif call.kind == "resize":
        evicted, _ = real.resize(call.capacity, sizes, pins)
        assert evicted.tolist() == plain.resize(call.capacity, sizes, pins).evicted
    else:
        pins[[index for index in call.ids if real.resident(index)]] = call.kind == "pin"


def assert_scale_free(name: str, **knobs: float) -> None:
    """Blocks of 4096 bytes fare as blocks of size 1 do."""
    rng = np.random.default_rng(3)
    ids, capacity = 200, 40
    stream = np.where(rng.random(20_000) < 0.6, rng.zipf(1.3, 20_000) % ids, np.arange(20_000) % ids)
    starts = np.array([0, len(stream)], np.int64)
    outcomes = [
        make_policy(name, ids, capacity * size, **knobs)
        .replay(stream.astype(np.int32), starts, np.full(ids, size, np.int64))
        .tolist()
        for size in (1, 4096)
    ]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].count(HIT) > 1_000
