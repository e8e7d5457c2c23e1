"""The kernels against slow plain references: the same answer, order and bytes after every call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.policy import MAX_IDS, Call, CheckedPolicy, calls, random_calls
from kvstrata.policies import POLICIES
from reference import REFERENCES
from reference.arc import PublishedArc
from reference.policy import Answer


class Twins:
    """A kernel and its reference, fed alike."""

    def __init__(self, name: str, max_ids: int, capacity: int, sizes: Sequence[int]) -> None:
        self.real = CheckedPolicy(name, max_ids, capacity, sizes)
        self.plain = REFERENCES[name](capacity)
        self.last_request: dict[int, int] = {}

    def run(self, stream: Sequence[Call]) -> list[Answer]:
        answers = []
        for call in stream:
            if call.kind == "access":
                answer = self.real.access(call.ids, call.admit, same_request=call.same_request)
                assert_same(answer, self._expected(call))
                answers.append(answer)
            elif call.kind == "remove":
                self.real.remove(call.ids)
                self.plain.remove(call.ids)
            elif call.kind == "resize":
                answer = self.real.resize(call.capacity)
                plain = self.plain.resize(call.capacity, self.real.sizes, self.real.pins)
                assert_same(answer, self._settled(plain))
            elif call.kind == "pin":
                self.real.pin(call.ids)
            else:
                self.real.unpin(call.ids)
            self.check()
        return answers

    def _expected(self, call: Call) -> Answer:
        """The reference's answer; where repeats do not count, it does not see them."""
        request = self.real.request
        again = [
            self.last_request.get(index) == request
            and self.plain.resident(index)
            and not self.real.policy.COUNTS_REPEATS
            for index in call.ids
        ]
        fresh = [position for position, repeated in enumerate(again) if not repeated]
        for position in fresh:
            self.last_request[call.ids[position]] = request
        answer = self.plain.access(
            [call.ids[position] for position in fresh],
            [call.admit[position] for position in fresh],
            self.real.sizes,
            self.real.pins,
            request,
        )
        hits = [True] * len(call.ids)
        for position, hit in zip(fresh, answer.hits, strict=True):
            hits[position] = hit
        return self._settled(Answer(hits, answer.evicted, answer.forgotten))

    def _settled(self, answer: Answer) -> Answer:
        """What left for good, each once; what is unknown now."""
        left = list(dict.fromkeys(item for item in answer.evicted if not self.plain.resident(item)))
        both = [*answer.forgotten, *answer.evicted]
        return Answer(
            answer.hits, left, [item for item in dict.fromkeys(both) if not self.plain.known(item)]
        )

    def check(self) -> None:
        assert self.real.policy.order().tolist() == self.plain.order()
        assert self.real.policy.used == self.real.weight(set(self.plain.order()))
        known = {index for index in range(self.real.policy.max_ids) if self.plain.known(index)}
        assert self.real.known() == known


def assert_same(answer: Answer, expected: Answer) -> None:
    assert answer.hits == expected.hits
    assert answer.evicted == expected.evicted
    assert sorted(answer.forgotten) == sorted(expected.forgotten)  # type: ignore[type-var]


def test_every_policy_has_a_reference() -> None:
    assert sorted(REFERENCES) == sorted(POLICIES)


@pytest.mark.parametrize("name", sorted(REFERENCES))
@settings(max_examples=150)
@given(stream=calls(40), capacity=st.integers(0, 40), data=st.data())
def test_random_streams(name: str, stream: list[Call], capacity: int, data: st.DataObject) -> None:
    sizes = data.draw(
        st.one_of(
            st.just([1] * MAX_IDS),
            st.lists(st.integers(1, 9), min_size=MAX_IDS, max_size=MAX_IDS),
        )
    )
    Twins(name, MAX_IDS, capacity, sizes).run(stream)


@pytest.mark.parametrize("equal_sizes", [True, False])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_long_runs(name: str, seed: int, equal_sizes: bool) -> None:
    rng = np.random.default_rng(seed)
    ids = 80
    sizes = [1] * ids if equal_sizes else rng.integers(1, 6, ids).tolist()
    capacity = 24 if equal_sizes else 70
    answers = Twins(name, ids, capacity, sizes).run(random_calls(rng, ids, capacity, 1_500))
    hits = [hit for answer in answers for hit in answer.hits]
    assert any(hits) and not all(hits)
    assert sum(len(answer.evicted) for answer in answers) > 100


@given(
    pages=st.lists(st.integers(0, 15), max_size=300),
    capacity=st.integers(1, 8),
    size=st.sampled_from([1, 4096]),
)
def test_single_accesses_are_arc_as_published(pages: list[int], capacity: int, size: int) -> None:
    """Figure 4 of the paper, page by page: the same hits, lists and target."""
    checked = CheckedPolicy("arc", 16, capacity * size, [size] * 16)
    published = PublishedArc(capacity)
    for page in pages:
        assert checked.access([page], [True]).hits == [published.request(page)]
        assert checked.policy.order().tolist() == published.t1 + published.t2
        ghosts = {*published.b1, *published.b2}
        assert checked.known() - checked.residents() == ghosts
        assert checked.policy._target[0] == pytest.approx(published.p * size)  # type: ignore[attr-defined]


def test_a_long_published_run() -> None:
    """A loop with a popular part, where ARC's adaptation matters."""
    rng = np.random.default_rng(7)
    capacity = 32
    checked = CheckedPolicy("arc", 200, capacity, [1] * 200)
    published = PublishedArc(capacity)
    for step in range(4_000):
        page = int(rng.integers(0, 20)) if rng.random() < 0.5 else step % 200
        assert checked.access([page], [True]).hits == [published.request(page)]
    assert checked.policy.order().tolist() == published.t1 + published.t2
