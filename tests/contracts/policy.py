"""What every eviction policy promises, checked from outside after every single call.

A test subclasses `PolicyContract`; the real one is parametrised over `kvstrata.policies.POLICIES`, so
that a new policy is covered without a new file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.errors import ConfigError
from kvstrata.policies import Policy, make_policy
from kvstrata.policies.base import ADMITTED, HIT, MISS
from reference.policy import Answer

MAX_IDS = 24


@dataclass
class Call:
    """One call of a random stream, drawn before it is known what is resident."""

    kind: str
    ids: list[int] = field(default_factory=list)
    admit: list[bool] = field(default_factory=list)
    same_request: bool = False
    capacity: int = 0


def calls(max_capacity: int, ids: int = MAX_IDS) -> st.SearchStrategy[list[Call]]:
    """Streams of every kind of call, mostly requests."""
    some = st.lists(st.integers(0, ids - 1), unique=True, max_size=8)
    access = st.builds(
        lambda chain, mask, same: Call("access", chain, mask[: len(chain)], same),
        some,
        st.one_of(st.just([True] * 8), st.lists(st.booleans(), min_size=8, max_size=8)),
        st.booleans(),
    )
    return st.lists(
        st.one_of(
            access,
            access,
            access,
            st.builds(lambda chain: Call("remove", chain), some),
            st.builds(lambda size: Call("resize", capacity=size), st.integers(0, max_capacity)),
            st.builds(lambda chain: Call("pin", chain), some),
            st.builds(lambda chain: Call("unpin", chain), some),
        ),
        max_size=60,
    )


class CheckedPolicy:
    """A policy with its owner's arrays; every call is checked against the contract, then answered."""

    def __init__(self, name: str, max_ids: int, capacity: int, sizes: Sequence[int]) -> None:
        self.policy: Policy = make_policy(name, max_ids, capacity)
        self.sizes = np.array(sizes, dtype=np.int64)
        self.pins = np.zeros(max_ids, dtype=np.int32)
        self.request = 0

    def residents(self) -> set[int]:
        return {index for index in range(self.policy.max_ids) if self.policy.resident(index)}

    def known(self) -> set[int]:
        return set(np.flatnonzero(self.policy.where).tolist())

    def pinned(self) -> set[int]:
        return set(np.flatnonzero(self.pins).tolist())

    def weight(self, ids: set[int]) -> int:
        return sum(int(self.sizes[index]) for index in ids)

    def pin(self, ids: Sequence[int]) -> None:
        """As a table does: what is resident only."""
        for index in ids:
            if self.policy.resident(index):
                self.pins[index] += 1

    def unpin(self, ids: Sequence[int]) -> None:
        for index in ids:
            if self.pins[index]:
                self.pins[index] -= 1

    def access(self, ids: Sequence[int], admit: Sequence[bool], *, same_request: bool = False) -> Answer:
        self.request += not same_request
        before, known, pins = self.residents(), self.known(), self.pins.copy()
        outcome, evicted, forgotten = self.policy.access(
            np.array(ids, dtype=np.int32),
            np.array(admit, dtype=np.bool_),
            self.sizes,
            self.pins,
            self.request,
        )
        answer = Answer((outcome == HIT).tolist(), evicted.tolist(), forgotten.tolist())
        assert np.array_equal(self.pins, pins), "the owner's pins were changed"
        after = self.residents()
        for index, may, what in zip(ids, admit, outcome.tolist(), strict=True):
            if what == MISS:
                assert index not in before or index in answer.evicted
                assert index not in after
            else:
                assert what == HIT or may, "an id came in that may not"
                assert index in after or index in answer.evicted
                assert what == ADMITTED or index in before
        admitted = {index for index, may in zip(ids, admit, strict=True) if may}
        self._check(before, known, admitted, answer)
        assert self.policy.used <= max(self.policy.capacity, self.weight(before))
        return answer

    def resize(self, capacity: int) -> Answer:
        before, known = self.residents(), self.known()
        evicted, forgotten = self.policy.resize(capacity, self.sizes, self.pins)
        answer = Answer([], evicted.tolist(), forgotten.tolist())
        self._check(before, known, set(), answer)
        assert self.policy.capacity == capacity
        assert self.policy.used <= max(capacity, self.weight(self.pinned()))
        return answer

    def remove(self, ids: Sequence[int]) -> None:
        """An owner that removes a pinned block gives its id back only later: here it drops the pins."""
        before, known = self.residents(), self.known()
        self.pins[list(ids)] = 0
        self.policy.remove(np.array(ids, dtype=np.int32), self.sizes)
        assert self.residents() == before - set(ids)
        assert self.known() == known - set(ids)
        self._check_listed()

    def _check(self, before: set[int], known: set[int], admitted: set[int], answer: Answer) -> None:
        after, known_after = self.residents(), self.known()
        evicted, forgotten = set(answer.evicted), set(answer.forgotten)
        assert len(evicted) == len(answer.evicted), "an id was evicted twice"
        assert len(forgotten) == len(answer.forgotten), "an id was forgotten twice"
        assert not evicted & self.pinned(), "a pinned id was evicted"
        assert not evicted & after, "an evicted id is still resident"
        assert before - after <= evicted, "an id left without a word"
        assert evicted <= before | admitted
        assert after - before <= admitted, "an id came in that was not admitted"
        assert not forgotten & known_after, "a forgotten id is still known"
        assert known - known_after <= forgotten, "an id was lost"
        assert known_after - known <= admitted
        self._check_listed()

    def _check_listed(self) -> None:
        residents = self.residents()
        order = self.policy.order().tolist()
        assert len(order) == len(set(order)), "an id is listed twice"
        assert set(order) == residents
        assert residents <= self.known()
        assert self.policy.used == self.weight(residents)
        bound = 2 * max(self.policy.capacity, self.policy.used)
        assert self.weight(self.known()) <= bound, "too many ghosts"

    def run(self, stream: Sequence[Call]) -> None:
        for call in stream:
            if call.kind == "access":
                self.access(call.ids, call.admit, same_request=call.same_request)
            elif call.kind == "remove":
                self.remove(call.ids)
            elif call.kind == "resize":
                self.resize(call.capacity)
            elif call.kind == "pin":
                self.pin(call.ids)
            else:
                self.unpin(call.ids)


class PolicyContract:
    """Subclasses give the `name` fixture."""

    @pytest.fixture
    def name(self) -> str:
        raise NotImplementedError

    @given(stream=calls(40), capacity=st.integers(0, 40), data=st.data())
    def test_every_call_keeps_the_contract(
        self, name: str, stream: list[Call], capacity: int, data: st.DataObject
    ) -> None:
        sizes = data.draw(
            st.one_of(
                st.just([1] * MAX_IDS),
                st.lists(st.integers(1, 9), min_size=MAX_IDS, max_size=MAX_IDS),
            )
        )
        CheckedPolicy(name, MAX_IDS, capacity, sizes).run(stream)

    @pytest.mark.parametrize("seed", range(3))
    def test_long_streams_keep_the_contract(self, name: str, seed: int) -> None:
        rng = np.random.default_rng(seed)
        ids = 60
        checked = CheckedPolicy(name, ids, 40, rng.integers(1, 4, ids).tolist())
        checked.run(random_calls(rng, ids, 60, 600))

    def test_room_is_used(self, name: str) -> None:
        checked = CheckedPolicy(name, 8, 4, [1] * 8)
        answer = checked.access([0, 1, 2, 3], [True] * 4)
        assert answer == Answer([False] * 4, [], [])
        assert checked.residents() == {0, 1, 2, 3}
        assert checked.access([0, 1, 2, 3], [True] * 4).hits == [True] * 4

    def test_what_may_not_come_in_stays_out(self, name: str) -> None:
        checked = CheckedPolicy(name, 8, 4, [1] * 8)
        checked.access([0, 1, 2], [False, True, False])
        assert checked.residents() == {1}

    def test_nothing_fits_beside_pins(self, name: str) -> None:
        checked = CheckedPolicy(name, 8, 2, [1] * 8)
        checked.access([0, 1], [True] * 2)
        checked.pin([0, 1])
        assert checked.access([2, 3], [True] * 2).evicted == []
        assert checked.residents() == {0, 1}
        checked.unpin([0])
        checked.access([4], [True])
        assert 1 in checked.residents()

    def test_an_id_larger_than_the_cache_evicts_nobody(self, name: str) -> None:
        checked = CheckedPolicy(name, 4, 3, [1, 1, 4, 1])
        checked.access([0, 1], [True] * 2)
        assert checked.access([2], [True]).evicted == []
        assert checked.residents() == {0, 1}

    def test_no_capacity_holds_nothing(self, name: str) -> None:
        checked = CheckedPolicy(name, 4, 0, [1] * 4)
        checked.access([0, 1, 2], [True] * 3)
        assert checked.residents() == set()

    @pytest.mark.parametrize("equal_sizes", [True, False])
    def test_many_requests_in_one_call_are_many_calls(self, name: str, equal_sizes: bool) -> None:
        """What the simulator does, against what the live table does."""
        rng = np.random.default_rng(11)
        ids, capacity = 300, 120
        sizes = np.ones(ids, np.int64) if equal_sizes else rng.integers(1, 5, ids)
        chains = [chain for _ in range(400) if len(chain := _chain(rng, ids))]
        starts = np.cumsum([0, *map(len, chains)]).astype(np.int64)
        whole, single = (make_policy(name, ids, capacity) for _ in range(2))
        flat = np.concatenate(chains).astype(np.int32)
        together = whole.replay(flat, starts, sizes).tolist()
        pins = np.zeros(ids, np.int32)
        one_by_one: list[int] = []
        for request, chain in enumerate(chains):
            may = np.ones(len(chain), np.bool_)
            answer = single.access(np.array(chain, np.int32), may, sizes, pins, request)
            one_by_one += answer.outcome.tolist()
        assert together == one_by_one
        assert whole.order().tolist() == single.order().tolist()
        assert {MISS, HIT, ADMITTED} >= set(together) >= {HIT, ADMITTED}

    @pytest.mark.parametrize("equal_sizes", [True, False])
    @pytest.mark.parametrize("found", [1, 37, 120])
    def test_admitting_each_is_a_call_for_each(self, name: str, found: int, equal_sizes: bool) -> None:
        """What a table does with the blocks that it finds when it opens, and all that follows from it."""
        rng = np.random.default_rng(found)
        ids, capacity = 300, 120
        sizes = np.ones(ids, np.int64) if equal_sizes else rng.integers(1, 5, ids)
        pins, one = np.zeros(ids, np.int32), np.ones(1, np.bool_)
        blocks = rng.permutation(ids)[:found].astype(np.int32)
        whole, single = (make_policy(name, ids, capacity) for _ in range(2))
        evicted, _ = whole.admit_each(blocks, sizes, pins, 7)
        for index in blocks:
            single.access(np.array([index], np.int32), one, sizes, pins, 7)
        assert whole.order().tolist() == single.order().tolist()
        assert len(whole.order()) == found or not equal_sizes
        assert not len(evicted) or not equal_sizes
        for request in [7, 7, *range(8, 300)]:
            chain = np.array(_chain(rng, ids), np.int32)
            may = np.ones(len(chain), np.bool_)
            answers = [policy.access(chain, may, sizes, pins, request) for policy in (whole, single)]
            assert [part.tolist() for part in answers[0]] == [part.tolist() for part in answers[1]]
        assert whole.order().tolist() == single.order().tolist()
        assert whole.where.tolist() == single.where.tolist()

    def test_an_unknown_parameter_names_the_known_ones(self, name: str) -> None:
        with pytest.raises(ConfigError, match="no parameter 'colour'"):
            make_policy(name, 8, 4, colour=1)


def _chain(rng: np.random.Generator, ids: int) -> list[int]:
    """A run of ids, beginning at a popular one."""
    first = int(rng.zipf(1.3)) % ids
    return [(first + step) % ids for step in range(int(rng.integers(0, 30)))]


def random_calls(rng: np.random.Generator, ids: int, max_capacity: int, count: int) -> list[Call]:
    """A seeded stream: popular chains, and now and then something else than a request."""
    stream = []
    for _ in range(count):
        kind = rng.choice(["access", "remove", "resize", "pin", "unpin"], p=[0.78, 0.04, 0.02, 0.06, 0.1])
        first = int(rng.zipf(1.4)) % ids
        chain = [(first + step) % ids for step in range(int(rng.integers(0, 10)))]
        stream.append(
            Call(
                str(kind),
                chain,
                [True] * len(chain) if rng.random() < 0.7 else (rng.random(len(chain)) < 0.6).tolist(),
                bool(rng.random() < 0.2),
                int(rng.integers(max_capacity // 2, max_capacity)),
            )
        )
    return stream
