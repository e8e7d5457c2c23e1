"""What one process believes of the pool: for how long, how much of it, and who knows better."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from kvstrata.config import PoolTierConfig
from kvstrata.table import Placements
from kvstrata.tiers.pool_books import PoolBooks
from kvstrata.types import Lookup
from store_kit import chain

HIT, MISS, PENDING, ASKING = Lookup.HIT, Lookup.MISS, Lookup.PENDING, Lookup.ASKING


@dataclass
class Heard:
    """A clock that stands still, and who was called."""

    now: float = 100.0
    woken: int = 0
    refused: list[int] = field(default_factory=list)

    def wake(self) -> None:
        self.woken += 1


def make(heard: Heard, **fields: Any) -> PoolBooks:
    given = {"lookup_seconds": 1.0, "there_seconds": 10.0, "missing_seconds": 2.0} | fields
    return PoolBooks(
        PoolTierConfig(master="host:1", **given),
        8192,
        batch_blocks=1000,
        wake=heard.wake,
        refused=heard.refused.append,
        clock=lambda: heard.now,
    )


def commit(books: PoolBooks, placements: Placements) -> None:
    count = len(placements)
    books.commit_all(placements, np.full(count, 8192), np.zeros(count, dtype=np.int64))


def test_a_key_is_pending_until_the_pool_has_answered() -> None:
    heard = Heard()
    books = make(heard)
    keys = chain(0, 3)
    assert books.lookup(keys) == [ASKING] * 3
    assert books.lookup(keys) == [ASKING] * 3 and heard.woken == 1, "a key was asked for twice"
    assert books.questions(100) == keys and books.questions(100) == []
    assert books.lookup(keys) == [ASKING] * 3 and heard.woken == 1
    books.answered(keys, [True, False, True])
    assert books.lookup(keys) == [HIT, MISS, HIT]
    assert books.asking == 0 and heard.woken == 1
    books.check_integrity()


def test_both_beliefs_have_their_time() -> None:
    heard = Heard()
    books = make(heard)
    there, missing = chain(0, 2)
    books.lookup([there, missing])
    books.answered(books.questions(10), [True, False])
    heard.now += 1.9
    assert books.lookup([there, missing]) == [HIT, MISS]
    heard.now += 0.2
    assert books.lookup([there, missing]) == [HIT, ASKING]
    books.answered(books.questions(10), [True])
    assert books.lookup([missing]) == [HIT]
    heard.now += 8.0
    assert books.lookup([there]) == [ASKING]


def test_what_is_used_is_asked_for_before_its_time_is_over() -> None:
    heard = Heard()
    books = make(heard)
    [key] = chain(0, 1)
    books.lookup([key])
    books.answered(books.questions(10), [True])
    for _ in range(10):
        heard.now += 6.0
        assert books.lookup([key]) == [HIT], "a key in use became pending"
        assert books.questions(10) == [key]
        books.answered([key], [True])
    heard.now += 6.0
    assert books.lookup([key]) == [HIT]
    books.answered(books.questions(10), [False])
    assert books.lookup([key]) == [MISS]


def test_nobody_waits_longer_than_lookup_seconds() -> None:
    heard = Heard()
    books = make(heard)
    [key] = chain(0, 1)
    assert books.lookup([key]) == [ASKING]
    books.questions(10)
    heard.now += 1.1
    assert books.lookup([key]) == [MISS], "a master that does not answer holds a request"
    books.unanswered([key])
    assert books.lookup([key]) == [ASKING], "nobody asks any more"


def test_what_was_written_meanwhile_is_known_better_than_an_old_answer() -> None:
    heard = Heard()
    books = make(heard)
    written, gone = chain(0, 2)
    books.lookup([written, gone])
    asked = books.questions(10)
    recorded = books.record([written], [True], request=1)
    assert books.lookup([written]) == [PENDING]
    commit(books, recorded.placed)
    books.discard([gone])
    books.answered(asked, [False, True])
    assert books.lookup([written, gone]) == [HIT, MISS]
    books.check_integrity()


def test_record_places_what_is_not_believed_there() -> None:
    books = make(Heard())
    keys = chain(0, 4)
    first = books.record(keys[:2], [True, True], request=1)
    assert first.placed.positions.tolist() == [0, 1] and first.hits == []
    again = books.record([*keys, keys[3]], [True, True, True, True, True], request=1)
    assert again.hits == [0, 1] and again.placed.positions.tolist() == [2, 3]
    commit(books, first.placed)
    books.abort_all(again.placed)
    touch = books.record(keys, request=2)
    assert touch.hits == [0, 1] and not len(touch.placed) and not touch.refused
    assert books.record(keys, [True] * 4, request=3).placed.keys == keys[2:]
    assert books.resident_blocks == 2 and books.used_bytes == 2 * 8192


def test_time_to_live_goes_into_the_placements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstrata.tiers.pool_books.unix_ms", lambda: 1_000_000)
    books = make(Heard())
    placed = books.record(chain(0, 2), [True] * 2, request=1, ttl_seconds=1.5).placed
    assert placed.expires_ms.tolist() == [1_001_500] * 2


def test_pins_are_counted_and_given_back_once() -> None:
    heard = Heard()
    books = make(heard)
    keys = chain(0, 3)
    commit(books, books.record(keys[:2], [True] * 2, request=1).placed)
    pinned = books.pin_all([keys[2], keys[1], keys[0]])
    assert pinned.positions.tolist() == [1, 2] and pinned.lengths.tolist() == [8192] * 2
    assert books.pinned_blocks() == 2
    assert books.drop(pinned[0]) and not books.drop(pinned[0])
    assert books.lookup([keys[1]]) == [MISS]
    books.unpin(pinned)
    with pytest.raises(AssertionError, match="twice"):
        books.unpin(pinned)
    assert books.pinned_blocks() == 0


def test_a_belief_whose_time_is_over_may_still_be_loaded() -> None:
    """A load right after its look-up must not lose the block to the clock; the pool says what is true."""
    heard = Heard()
    books = make(heard)
    keys = chain(0, 1)
    commit(books, books.record(keys, [True], request=1).placed)
    heard.now += 11.0
    assert len(books.pin_all(keys)) == 1


@pytest.mark.parametrize("there", [True, False])
def test_memory_has_a_bound(there: bool) -> None:
    heard = Heard()
    books = make(heard, remembered_keys=50, asking_keys=20)
    for number in range(20):
        keys = chain(number, 20)
        books.lookup(keys)
        assert books.asking <= 20
        books.answered(books.questions(100), [there] * 20)
        books.check_integrity()
    assert books.resident_blocks == (50 if there else 0)
    assert books.lookup(chain(19, 20)) == [HIT if there else MISS] * 20, "the newest were forgotten"


def test_too_many_questions_are_misses_and_counted() -> None:
    heard = Heard()
    books = make(heard, asking_keys=3)
    assert books.lookup(chain(0, 5)) == [ASKING] * 3 + [MISS] * 2
    assert heard.refused == [2]
    books.answered(books.questions(10), [True] * 3)
    assert books.lookup(chain(0, 5)) == [HIT] * 3 + [ASKING] * 2


def test_as_many_writes_as_keys_may_be_remembered() -> None:
    books = make(Heard(), remembered_keys=3)
    recorded = books.record(chain(0, 5), [True] * 5, request=1)
    assert len(recorded.placed) == 3 and recorded.refused == [3, 4]
    commit(books, recorded.placed)
    assert len(books.record(chain(1, 2), [True] * 2, request=1).placed) == 2
