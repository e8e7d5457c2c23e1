"""What the tests of traces share: what must hold of every trace, and comparing two."""

from __future__ import annotations

import dataclasses

import numpy as np

from kvstrata.traces.trace import Trace, TraceSource


def assert_sound(trace: Trace) -> None:
    """Ids count from 0 as they appear; every request is a chain, so a parent is in the trace before."""
    starts, ids = trace.starts, trace.ids
    assert starts[0] == 0 and starts[-1] == len(ids) == trace.head.accesses
    assert len(starts) == trace.head.requests + 1 == len(trace.time_s) + 1
    assert (np.diff(trace.time_s) >= 0).all() and trace.time_s[0] == 0
    unique, first = np.unique(ids, return_index=True)
    assert unique.tolist() == list(range(trace.head.unique))
    assert (np.diff(first) > 0).all()
    place = np.arange(len(ids)) - np.repeat(starts[:-1], np.diff(starts))
    before = np.where(place > 0, np.concatenate([[-1], ids[:-1]]), -1)
    assert (trace.parent[ids] == before).all()
    assert (trace.depth[ids] == place).all()
    assert (trace.parent < np.arange(trace.head.unique)).all()
    assert (trace.size > 0).all()


def assert_same(trace: Trace, source: TraceSource, max_accesses: int) -> None:
    """The source's batches, put together, are the trace, and obey max_accesses."""
    assert source.head == trace.head
    batches = list(source.batches(max_accesses))
    first = 0
    for batch in batches:
        assert batch.first_request == first
        assert batch.starts[0] == 0 and batch.starts[-1] == len(batch.ids)
        assert batch.requests == 1 or len(batch.ids) <= max_accesses
        first += batch.requests
    lengths = np.concatenate([np.diff(batch.starts) for batch in batches])
    assert lengths.tolist() == np.diff(trace.starts).tolist()
    ids = np.concatenate([batch.ids for batch in batches])
    assert ids.dtype == trace.ids.dtype and (ids == trace.ids).all()
    for name, by_id in (("parents", trace.parent), ("depths", trace.depth), ("sizes", trace.size)):
        column = np.concatenate([getattr(batch, name) for batch in batches])
        assert column.dtype == by_id.dtype and (column == by_id[ids]).all(), name
    for name in ("time_s", "session", "tenant"):
        column, expected = (
            np.concatenate([getattr(batch, name) for batch in batches]),
            getattr(trace, name),
        )
        assert column.dtype == expected.dtype and (column == expected).all(), name
    for name, expected in trace.features.items():
        column = np.concatenate([batch.features[name] for batch in batches])
        assert column.dtype == expected.dtype and (column == expected).all(), name


def renamed(trace: Trace, **changes: object) -> Trace:
    """The trace with another head."""
    return dataclasses.replace(trace, head=dataclasses.replace(trace.head, **changes))  # type: ignore[arg-type]
