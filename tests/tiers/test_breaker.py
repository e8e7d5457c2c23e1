"""Breaker with a clock of our own: when it opens, when it asks for a probe, and what it counts."""

from __future__ import annotations

import errno

import pytest

from kvstrata.telemetry import Telemetry
from kvstrata.tiers.breaker import LOOKS_PER_DEADLINE, Breaker


class Medium:
    """A breaker and the time."""

    def __init__(self, failures: int = 3) -> None:
        self.now = 100.0
        self.telemetry = Telemetry()
        self.breaker = Breaker(
            "nvme",
            "read",
            failures=failures,
            deadline_seconds=5.0,
            retry_seconds=10.0,
            telemetry=self.telemetry,
            clock=lambda: self.now,
        )

    def good(self) -> None:
        with self.breaker.watch():
            pass

    def bad(self, number: int = errno.EIO) -> None:
        with pytest.raises(OSError), self.breaker.watch():
            raise OSError(number, "broken")

    @property
    def opened(self) -> int:
        return self.telemetry.value("breaker_opened_total", "nvme", "read")


def test_it_opens_after_errors_in_a_row() -> None:
    medium = Medium()
    medium.bad()
    medium.bad()
    assert medium.breaker.closed and medium.breaker.reason == ""
    medium.good()
    medium.bad()
    medium.bad()
    assert medium.breaker.closed
    medium.bad()
    assert not medium.breaker.closed
    assert "3 errors in a row" in medium.breaker.reason and "broken" in medium.breaker.reason
    assert medium.opened == 1
    assert medium.telemetry.value("io_errors_total", "nvme", "read", "EIO") == 5
    assert [event.kind for event in medium.telemetry.events()] == ["nvme read unavailable"]


def test_further_errors_do_not_open_it_again() -> None:
    medium = Medium(failures=1)
    for _ in range(4):
        medium.bad()
    assert medium.opened == 1


def test_errors_are_counted_by_name() -> None:
    medium = Medium(failures=10)
    for number in (errno.ENOSPC, errno.EACCES, 123_456):
        medium.bad(number)
    with pytest.raises(OSError), medium.breaker.watch():
        raise OSError("without a number")
    assert medium.telemetry.counters()["io_errors_total"] == {
        ("nvme", "read", "ENOSPC"): 1,
        ("nvme", "read", "EACCES"): 1,
        ("nvme", "read", "unknown"): 2,
    }


def test_what_is_no_error_of_the_medium_does_not_count() -> None:
    medium = Medium(failures=1)
    with pytest.raises(ValueError), medium.breaker.watch():
        raise ValueError
    assert medium.breaker.closed
    medium.now += 1_000
    assert medium.breaker.closed, "the operation has ended"


def test_it_opens_when_an_operation_does_not_answer() -> None:
    medium = Medium()
    with medium.breaker.watch():
        medium.now += 5.0
        assert medium.breaker.closed
        medium.now += 0.1
        assert not medium.breaker.closed
        assert not medium.breaker.closed
        assert medium.breaker.reason == "no answer for 5 s"
    assert not medium.breaker.closed, "an answer at last is no probe"
    assert medium.opened == 1


def test_the_oldest_operation_decides() -> None:
    medium = Medium()
    with medium.breaker.watch():
        medium.now += 3.0
        medium.good()
        with medium.breaker.watch():
            medium.now += 2.5
            assert not medium.breaker.closed

    medium = Medium()
    for _ in range(4):  # each is quick enough, all together are not
        with medium.breaker.watch():
            medium.now += 4.0
            assert medium.breaker.closed


def test_a_good_probe_closes_it() -> None:
    medium = Medium(failures=2)
    medium.bad()
    medium.bad()
    assert not medium.breaker.wants_probe()
    medium.now += 9.9
    assert not medium.breaker.wants_probe()
    medium.now += 0.2
    assert medium.breaker.wants_probe()
    assert not medium.breaker.wants_probe(), "one probe at a time"
    medium.breaker.probed(None)
    assert medium.breaker.closed and medium.breaker.reason == ""
    assert not medium.breaker.wants_probe()
    assert medium.telemetry.value("probes_total", "nvme", "read", "good") == 1
    medium.bad()
    assert medium.breaker.closed, "the count of errors begins anew"
    assert medium.telemetry.events()[-1].kind == "nvme read available again"


def test_a_bad_probe_keeps_it_open_for_another_retry_time() -> None:
    medium = Medium(failures=1)
    medium.bad()
    medium.now += 10.0
    assert medium.breaker.wants_probe()
    medium.breaker.probed(OSError(errno.ENOSPC, "still full"))
    assert not medium.breaker.closed
    assert "still full" in medium.breaker.reason
    assert not medium.breaker.wants_probe()
    medium.now += 10.0
    assert medium.breaker.wants_probe()
    medium.breaker.probed(ValueError("of another kind"))
    assert medium.telemetry.counters()["probes_total"] == {
        ("nvme", "read", "ENOSPC"): 1,
        ("nvme", "read", "bad"): 1,
    }
    assert medium.opened == 1


def test_a_closed_one_wants_no_probe() -> None:
    medium = Medium()
    medium.now += 1_000
    assert not medium.breaker.wants_probe()


def test_after_a_good_probe_an_old_hang_is_forgotten() -> None:
    medium = Medium(failures=2)
    with pytest.raises(OSError), medium.breaker.watch():
        medium.now += 20.0
        assert not medium.breaker.closed
        medium.now += 10.0
        assert medium.breaker.wants_probe()
        medium.breaker.probed(None)
        medium.now += 100.0
        assert medium.breaker.closed
        raise OSError(errno.EIO, "gave up at last")
    assert medium.breaker.closed


def test_trip_opens_at_once_and_is_counted_once() -> None:
    medium = Medium()
    medium.breaker.trip("cannot be opened")
    medium.breaker.trip("cannot be opened, still")
    assert not medium.breaker.closed
    assert medium.breaker.reason == "cannot be opened, still"
    assert medium.opened == 1
    medium.now += 10.0
    assert medium.breaker.wants_probe()


def test_it_opens_when_an_engine_does_not_answer() -> None:
    medium = Medium()
    oldest, forgiven = 0.0, []
    medium.breaker.watch_engine(lambda: oldest, lambda: forgiven.append(medium.now))
    assert medium.breaker.closed
    oldest = 5.1
    assert medium.breaker.closed, "it looks now and then only"
    medium.now += 0.1
    assert not medium.breaker.closed
    assert medium.breaker.reason == "no answer for 5 s"
    assert medium.opened == 1
    oldest = 0.0
    medium.now += 10.0
    assert not medium.breaker.closed, "an answer at last is no probe"
    assert forgiven == []
    assert medium.breaker.wants_probe()
    medium.breaker.probed(None)
    assert medium.breaker.closed and forgiven == [medium.now]


def test_it_does_not_ask_the_engine_every_time() -> None:
    medium = Medium()
    asked: list[float] = []

    def oldest() -> float:
        asked.append(medium.now)
        return 0.0

    medium.breaker.watch_engine(oldest, lambda: None)
    for _ in range(1_000):
        assert medium.breaker.closed
        medium.now += 5.0 / 1_000
    assert 2 <= len(asked) <= LOOKS_PER_DEADLINE + 1


def test_the_older_of_engine_and_upkeep_decides() -> None:
    for engine, upkeep in ((1.0, 5.1), (5.1, 1.0)):
        medium = Medium()
        medium.breaker.watch_engine(lambda age=engine: age, lambda: None)
        with medium.breaker.watch():
            medium.now += upkeep
            assert not medium.breaker.closed


def test_errors_of_an_engine_in_their_order() -> None:
    medium = Medium()
    medium.breaker.saw([errno.EIO, errno.EIO])
    medium.breaker.saw([0, 0, 0])
    medium.breaker.saw([errno.EIO, errno.EIO, 0, errno.EIO, errno.EIO])
    assert medium.breaker.closed
    medium.breaker.saw([errno.ENOSPC, 0, 0])
    assert not medium.breaker.closed, "three in a row, whatever came then"
    assert "3 errors in a row" in medium.breaker.reason and "No space" in medium.breaker.reason
    assert medium.telemetry.counters()["io_errors_total"] == {
        ("nvme", "read", "EIO"): 6,
        ("nvme", "read", "ENOSPC"): 1,
    }
    assert medium.opened == 1


def test_what_was_not_begun_says_nothing_of_the_medium() -> None:
    medium = Medium()
    medium.breaker.saw([errno.EIO, errno.EIO])
    medium.breaker.saw([])
    medium.breaker.saw([errno.EIO])
    assert not medium.breaker.closed


def test_operations_of_an_engine_and_of_upkeep_count_together() -> None:
    medium = Medium()
    medium.breaker.saw([errno.EIO, errno.EIO])
    medium.bad()
    assert not medium.breaker.closed
