"""The builder against plain dictionaries, and its corners by hand."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.errors import TraceFormatError
from kvstrata.traces import builder as builder_module
from kvstrata.traces.builder import TraceBuilder
from kvstrata.traces.trace import FEATURES

names = st.one_of(st.integers(-3, 30), st.integers(2**62, 2**62 + 3), st.sampled_from("abc"))
request = st.fixed_dictionaries(
    {
        "time_s": st.integers(-5, 5).map(float),
        "blocks": st.lists(names, max_size=6),
        "chain": st.booleans(),
        "session": st.one_of(st.none(), st.sampled_from(["s", "t", 3])),
        "tenant": st.one_of(st.none(), st.integers(0, 3)),
        "model": st.one_of(st.none(), st.sampled_from(["m", "n"])),
        "input_tokens": st.one_of(st.none(), st.integers(0, 9)),
    }
)


def dense(values: list[Hashable]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [-1 if value is None else numbers.setdefault(value, len(numbers)) for value in values]


@given(st.lists(request, min_size=1, max_size=12))
def test_against_plain_reference(requests: list[dict[str, Any]]) -> None:
    built = TraceBuilder("t", "f", 16, 64)
    for place, one in enumerate(requests):
        one["sizes"] = [place + 1] * len(one["blocks"])
        built.add(**one)
    trace = built.build(skipped=4)

    ordered = sorted(requests, key=lambda one: one["time_s"])
    ids = dense([name for one in ordered for name in one["blocks"]])
    parent, depth, size = {}, {}, {}
    access = 0
    for one in ordered:
        for place in range(len(one["blocks"])):
            number = ids[access]
            if number not in parent:
                chained = one["chain"] and place > 0
                parent[number] = ids[access - 1] if chained else -1
                depth[number] = place if chained else 0
                size[number] = one["sizes"][place]
            access += 1
    assert trace.ids.tolist() == ids
    assert np.diff(trace.starts).tolist() == [len(one["blocks"]) for one in ordered]
    assert trace.parent.tolist() == [parent[number] for number in sorted(parent)]
    assert trace.depth.tolist() == [depth[number] for number in sorted(depth)]
    assert trace.size.tolist() == [size[number] for number in sorted(size)]
    assert trace.time_s.tolist() == [one["time_s"] - ordered[0]["time_s"] for one in ordered]
    assert trace.session.tolist() == dense([one["session"] for one in ordered])
    assert trace.tenant.tolist() == dense([one["tenant"] for one in ordered])
    model = trace.features["model"].tolist()
    labels = trace.head.labels["model"]
    assert [None if code < 0 else labels[code] for code in model] == [one["model"] for one in ordered]
    assert list(dict.fromkeys(code for code in model if code >= 0)) == list(range(len(labels)))
    tokens = [-1 if one["input_tokens"] is None else one["input_tokens"] for one in ordered]
    assert trace.features["input_tokens"].tolist() == tokens
    assert set(trace.features) == set(FEATURES)
    assert trace.features["stop"].tolist() == [-1] * len(ordered)
    head = trace.head
    assert (head.requests, head.accesses, head.unique, head.skipped) == (
        len(ordered),
        len(ids),
        len(size),
        4,
    )
    expected_bytes = next(iter(size.values())) if len(set(size.values())) == 1 else 0 if size else 64
    assert head.block_bytes == expected_bytes
    long, short = np.dtype("i8"), np.dtype("i4")
    assert {array.dtype for array in (trace.starts, trace.size, trace.features["input_tokens"])} == {long}
    assert {array.dtype for array in (trace.ids, trace.parent, trace.depth, trace.session)} == {short}
    assert {array.dtype for array in (trace.tenant, trace.features["model"])} == {short}
    assert trace.time_s.dtype == np.dtype("f8")


@given(
    st.lists(st.lists(st.integers(0, 40), max_size=5), min_size=1, max_size=10),
    st.sampled_from(["i4", "i8", "u4", "u8"]),
    st.sampled_from([1, 2**25]),
)
def test_arrays_lists_and_mixtures_make_the_same_trace(
    requests: list[list[int]], kind: str, spread: int
) -> None:
    traces = []
    for way in range(4):
        built = TraceBuilder("t", "f", block_bytes=8)
        for place, blocks in enumerate(requests):
            scaled = [block * spread for block in blocks]
            array = np.array(scaled, kind)
            if way == 1 or (way == 2 and place % 2):
                built.add(0.0, scaled)
            elif way == 3 and place % 2:
                built.add(0.0, array.astype("u8" if kind[0] == "i" else "i8"))
            else:
                built.add(0.0, array)
        traces.append(built.build())
    for other in traces[1:]:
        assert other.head == traces[0].head
        assert other.ids.tolist() == traces[0].ids.tolist()
        assert other.parent.tolist() == traces[0].parent.tolist()


def test_objects_beyond_63_bits_stay_apart() -> None:
    built = TraceBuilder("t", "f", block_bytes=1)
    built.add(0, np.array([2**64 - 1, 2**64 - 2, 2**64 - 1, 0], np.uint64))
    assert built.build().ids.tolist() == [0, 1, 0, 2]


def test_the_callers_array_may_change_later() -> None:
    built = TraceBuilder("t", "f", block_bytes=1)
    blocks = np.array([1, 2])
    built.add(0, blocks)
    blocks[:] = 9
    built.add(1, np.array([1]))
    assert built.build().ids.tolist() == [0, 1, 0]


def test_single_blocks_mix_with_requests() -> None:
    built = TraceBuilder("t", "f", block_bytes=1)
    built.add(3.0, [7, 8], session="s")
    built.add_single_blocks(np.array([5.0, 1.0]), np.array([8, 9]), np.array([1, 1]))
    built.add(2.0, [9], model="m")
    trace = built.build()
    assert built.requests == 4
    assert trace.ids.tolist() == [0, 0, 1, 2, 2]
    assert trace.time_s.tolist() == [0, 1, 2, 4]
    assert trace.parent.tolist() == [-1, -1, 1]
    assert trace.session.tolist() == [-1, -1, 0, -1]
    assert trace.features["model"].tolist() == [-1, 0, -1, -1]


def test_an_add_that_fails_leaves_no_trace() -> None:
    built = TraceBuilder("t", "f", block_bytes=1)
    with pytest.raises(TypeError):
        built.add(0, ["a", ["unhashable"]])  # type: ignore[list-item]
    built.add(0, ["b"])
    trace = built.build()
    assert (trace.head.unique, trace.ids.tolist(), trace.parent.tolist()) == (1, [0], [-1])


def test_requests_without_blocks() -> None:
    built = TraceBuilder("t", "f", block_bytes=32)
    built.add(0, [])
    built.add(1, np.array([], np.int64))
    trace = built.build()
    assert (trace.head.requests, trace.head.accesses, trace.head.unique, trace.head.block_bytes) == (
        2,
        0,
        0,
        32,
    )
    assert [batch.requests for batch in trace.batches()] == [2]


def test_errors() -> None:
    with pytest.raises(TraceFormatError, match=r"some\.csv: no requests"):
        TraceBuilder("some.csv", "f").build()
    with pytest.raises(TraceFormatError, match=r"some\.csv: no requests \(3 broken\)"):
        TraceBuilder("some.csv", "f").build(skipped=3)
    endless = TraceBuilder("t", "f", block_bytes=1)
    endless.add(float("nan"), [1])
    with pytest.raises(TraceFormatError, match="finite"):
        endless.build()


def test_too_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder_module, "MAX_UNIQUE", 3)
    built = TraceBuilder("t", "f", block_bytes=1)
    built.add(0, [1, 2, 3])
    assert built.build().head.unique == 3
    built.add(1, [4])
    with pytest.raises(TraceFormatError, match="4 unique blocks"):
        built.build()
