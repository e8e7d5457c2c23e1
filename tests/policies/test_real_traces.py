"""Every kernel against its slow plain reference on requests of real users: hits, order and ghosts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvstrata.policies import POLICIES, make_policy
from kvstrata.policies.base import HIT
from kvstrata.traces.open import open_trace
from kvstrata.traces.trace import Trace
from open_traces import AGENTIC
from reference import REFERENCES

SAMPLE = Path(__file__).parents[1] / "data" / "mooncake_conversation_300.jsonl"
AGENT = AGENTIC / "trace_0034.json.gz"


class Same:
    """One answer for every item."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __getitem__(self, item: object) -> int:
        return self.value


def assert_equal(trace: Trace, name: str, capacity: int) -> None:
    """All requests through both, block by block on the slow side."""
    unique = trace.head.unique
    policy = make_policy(name, unique, capacity)
    plain = REFERENCES[name](capacity)
    outcome = policy.replay(trace.ids, trace.starts, np.ones(unique, np.int64))
    hits: list[bool] = []
    for request, (first, end) in enumerate(zip(trace.starts, trace.starts[1:], strict=False)):
        chain = trace.ids[first:end].tolist()
        answer = plain.access(chain, [True] * len(chain), Same(1), Same(0), request)
        hits += answer.hits
    assert (outcome == HIT).tolist() == hits
    assert policy.order().tolist() == plain.order()
    assert np.flatnonzero(policy.where).tolist() == [i for i in range(unique) if plain.known(i)]


@pytest.mark.parametrize("capacity", [60, 600])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_chat_service(name: str, capacity: int) -> None:
    trace = open_trace(SAMPLE)
    assert isinstance(trace, Trace)
    assert_equal(trace, name, capacity)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_an_agent(name: str) -> None:
    if not AGENT.exists():
        pytest.skip("the real traces are not beside the repository")
    trace = open_trace(AGENT)
    assert isinstance(trace, Trace)
    assert_equal(trace, name, 400)
