"""The rules of the read cache, one by one, with a clock that stands still unless it is told to go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.attach_rules import DAY_SECONDS, AttachRules, ReadGhosts, TokenBucket
from kvstrata.config import NvmeTierConfig
from kvstrata.types import BlockKey

KEYS = [BlockKey(bytes([n]) * 32) for n in range(10)]
SPACE = bytes.fromhex("ab" * 32)


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def rules(clock: Clock | None = None, **fields: Any) -> AttachRules:
    config = NvmeTierConfig("x", **({"attach": "always"} | fields))
    return AttachRules(config, SPACE, 100, clock or Clock())


def sizes(*lengths: int) -> Any:
    return np.array(lengths, np.int64)


def ask(rule: AttachRules, count: int, *, size: int = 100, read: bool = True) -> tuple[int, dict[str, int]]:
    """How many of the first keys may enter, and how many were turned away by which rule."""
    chosen, refused = rule.choose(KEYS[:count], np.full(count, size, np.int64), read=read)
    told = {reason: int(which.sum()) for reason, which in refused.items()}
    assert int(chosen.sum()) + sum(told.values()) == count, "a block was turned away without a word"
    return int(chosen.sum()), told


def test_always() -> None:
    assert ask(rules(), 10) == (10, {})


@pytest.mark.parametrize(
    ("prefixes", "enters"), [((), True), (("ab",), True), (("00", "abab"), True), (("ac",), False)]
)
def test_namespaces(prefixes: tuple[str, ...], enters: bool) -> None:
    expected = (10, {}) if enters else (0, {"namespace": 10})
    assert ask(rules(attach_namespaces=prefixes), 10) == expected


def test_sizes_are_of_each_block() -> None:
    rule = rules(attach_min_bytes=50, attach_max_bytes=80)
    chosen, refused = rule.choose(KEYS[:5], sizes(49, 50, 80, 81, 60))
    assert chosen.tolist() == [False, True, True, False, True]
    assert refused["size"].tolist() == [True, False, False, True, False]


@pytest.mark.parametrize("reads", [1, 2, 3])
def test_the_nth_read(reads: int) -> None:
    rule = rules(attach="second", attach_reads=reads)
    for _ in range(reads - 1):
        assert ask(rule, 4) == (0, {"first_read": 4})
    assert ask(rule, 6) == ((4, {"first_read": 2}) if reads > 1 else (6, {}))
    rule.attached(KEYS[:4])
    assert rule.ghosts == (2 if reads > 1 else 0)


def test_company_needs_no_reads_of_its_own() -> None:
    assert ask(rules(attach="second"), 4, read=False) == (4, {})


def test_remembered_reads_are_bounded_and_the_latest() -> None:
    ghosts = ReadGhosts(3)
    for number in range(10):
        ghosts.read(KEYS[number])
        assert len(ghosts) <= 3
    assert [ghosts.read(KEYS[number]) for number in (9, 8, 7)] == [2, 2, 2]
    assert ghosts.read(KEYS[0]) == 1
    ghosts.forget(KEYS[0])
    ghosts.forget(KEYS[0])
    assert len(ghosts) == 2


def test_bandwidth_by_the_second() -> None:
    clock = Clock()
    rule = rules(clock, attach_bytes_per_second=300)
    assert ask(rule, 5) == (3, {"bandwidth": 2})
    assert ask(rule, 2) == (0, {"bandwidth": 2})
    clock.now += 0.5
    assert ask(rule, 5) == (1, {"bandwidth": 4})
    clock.now += 1_000
    assert ask(rule, 9) == (3, {"bandwidth": 6})


def test_endurance_by_the_day() -> None:
    clock = Clock()
    rule = rules(clock, attach_bytes_per_day=400)
    assert ask(rule, 6) == (4, {"endurance": 2})
    clock.now += DAY_SECONDS / 4
    assert ask(rule, 6) == (1, {"endurance": 5})
    clock.now += 10 * DAY_SECONDS
    assert ask(rule, 6) == (4, {"endurance": 2})


def test_what_one_budget_refuses_does_not_cost_the_other() -> None:
    rule = rules(attach_bytes_per_second=800, attach_bytes_per_day=300)
    assert ask(rule, 5) == (3, {"endurance": 2})
    assert ask(rule, 6) == (0, {"bandwidth": 1, "endurance": 5})


def test_what_was_not_written_is_given_back() -> None:
    rule = rules(attach_bytes_per_day=200)
    assert ask(rule, 2) == (2, {})
    rule.give_back(sizes(100))
    assert ask(rule, 2) == (1, {"endurance": 1})


def test_a_budget_below_one_block_lets_one_in_from_time_to_time() -> None:
    clock = Clock()
    rule = rules(clock, attach_bytes_per_second=10)
    assert ask(rule, 2) == (1, {"bandwidth": 1})
    clock.now += 9.9
    assert ask(rule, 1) == (0, {"bandwidth": 1})
    clock.now += 0.1
    assert ask(rule, 1) == (1, {})


@given(
    rate=st.integers(1, 1_000),
    steps=st.lists(st.tuples(st.floats(0, 5), st.lists(st.integers(1, 100), max_size=8)), max_size=30),
)
def test_a_bucket_never_gives_more_than_its_rate(rate: int, steps: list[tuple[float, list[int]]]) -> None:
    clock = Clock()
    bucket = TokenBucket(rate, max(rate, 100), clock)
    begin, given_out = clock.now, 0
    for pause, wanted in steps:
        clock.now += pause
        count = bucket.take(np.array(wanted, np.int64))
        given_out += sum(wanted[:count])
        assert given_out <= max(rate, 100) + rate * (clock.now - begin) + 1e-6
        if count < len(wanted):
            assert bucket.take(np.array(wanted[count : count + 1], np.int64)) == 0


def test_no_rate_is_no_bound() -> None:
    assert TokenBucket(0, 0, Clock()).take(np.full(1_000, 2**40)) == 1_000
