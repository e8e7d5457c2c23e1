"""AdmissionGate: its bounds hold, fronts of batches come in, throttled saves wait and not for ever."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.admission import Admission, AdmissionGate

FOREVER_SECONDS = 60.0


def test_blocks_are_bounded() -> None:
    gate = AdmissionGate(3, 1_000, "drop", 0.0)
    assert gate.enter([5, 5]) == (Admission.ADMIT, 2)
    assert gate.enter([5]) == (Admission.ADMIT, 1)
    assert gate.enter([0]) == (Admission.REJECT, 0)
    assert gate.held == (3, 15)
    gate.leave(2, 10)
    assert gate.enter([5, 5]) == (Admission.ADMIT, 2)


def test_bytes_are_bounded() -> None:
    gate = AdmissionGate(100, 1_000, "drop", 0.0)
    assert gate.enter([1_000]) == (Admission.ADMIT, 1)
    assert gate.enter([1]) == (Admission.REJECT, 0)
    gate.leave(1, 1_000)
    assert gate.enter([1_001]) == (Admission.REJECT, 0)
    assert gate.held == (0, 0)


def test_of_a_batch_the_front_enters() -> None:
    gate = AdmissionGate(4, 1_000, "drop", 0.0)
    assert gate.enter([10, 10, 10]) == (Admission.ADMIT, 3)
    assert gate.enter([10, 10]) == (Admission.ADMIT, 1)
    assert gate.held == (4, 40)
    assert gate.enter([10]) == (Admission.REJECT, 0)


def test_of_a_batch_larger_than_the_bound_the_front_enters() -> None:
    gate = AdmissionGate(100, 35, "drop", 0.0)
    assert gate.enter([10] * 8) == (Admission.ADMIT, 3)
    assert gate.held == (3, 30)
    # A small block behind one that does not fit stays out: a chain with a hole is worth nothing.
    assert gate.enter([10, 1]) == (Admission.REJECT, 0)


def test_nothing_always_enters() -> None:
    gate = AdmissionGate(1, 1, "drop", 0.0)
    gate.enter([1])
    assert gate.enter([]) == (Admission.ADMIT, 0)


def test_drop_never_waits() -> None:
    """Even with a waiting time: a thread that waited would never be freed here."""
    gate = AdmissionGate(1, 10, "drop", FOREVER_SECONDS * 60)
    assert gate.enter([1]) == (Admission.ADMIT, 1)
    assert gate.enter([1]) == (Admission.REJECT, 0)


def test_a_throttled_save_comes_in_when_there_is_room() -> None:
    gate = AdmissionGate(1, 10, "throttle", FOREVER_SECONDS)
    assert gate.enter([4]) == (Admission.ADMIT, 1)
    verdicts: list[tuple[Admission, int]] = []
    waiting = threading.Thread(target=lambda: verdicts.append(gate.enter([5])))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive() and verdicts == []
    gate.leave(1, 4)
    waiting.join(FOREVER_SECONDS)
    assert verdicts == [(Admission.THROTTLE, 1)]
    assert gate.held == (1, 5)


def test_a_throttled_save_gives_up_and_its_front_comes_in() -> None:
    gate = AdmissionGate(2, 10, "throttle", 0.01)
    gate.enter([1])
    assert gate.enter([1, 1]) == (Admission.THROTTLE, 1)
    assert gate.enter([1]) == (Admission.REJECT, 0)
    assert gate.held == (2, 2)


def test_what_can_never_fit_does_not_wait() -> None:
    gate = AdmissionGate(2, 10, "throttle", FOREVER_SECONDS * 60)
    assert gate.enter([11]) == (Admission.REJECT, 0)
    assert gate.enter([1, 1, 1]) == (Admission.THROTTLE, 2)


def test_room_for_a_small_one_wakes_it_behind_a_large_one() -> None:
    gate = AdmissionGate(4, 100, "throttle", FOREVER_SECONDS)
    gate.enter([1] * 4)
    verdicts: dict[int, tuple[Admission, int]] = {}
    threads = [
        threading.Thread(target=lambda size=size: verdicts.update({size: gate.enter([1] * size)}))
        for size in (3, 1)
    ]
    for thread in threads:
        thread.start()
    gate.leave(1, 1)
    threads[1].join(FOREVER_SECONDS)
    assert verdicts == {1: (Admission.THROTTLE, 1)}
    gate.leave(3, 3)
    threads[0].join(FOREVER_SECONDS)
    assert verdicts[3] == (Admission.THROTTLE, 3)


def test_leaving_more_than_entered_is_an_assertion() -> None:
    gate = AdmissionGate(2, 10, "drop", 0.0)
    gate.enter([5])
    with pytest.raises(AssertionError):
        gate.leave(2, 5)


@given(
    steps=st.lists(st.tuples(st.lists(st.integers(0, 50), max_size=6), st.booleans()), max_size=60),
    max_blocks=st.integers(1, 8),
    max_bytes=st.integers(1, 80),
)
def test_any_sequence_is_what_arithmetic_says(
    steps: list[tuple[list[int], bool]], max_blocks: int, max_bytes: int
) -> None:
    gate = AdmissionGate(max_blocks, max_bytes, "drop", 0.0)
    inside: list[int] = []
    for sizes, leaves in steps:
        if leaves and inside:
            gate.leave(1, inside.pop(0))
        count = 0
        while (
            count < len(sizes)
            and len(inside) + count < max_blocks
            and sum(inside) + sum(sizes[: count + 1]) <= max_bytes
        ):
            count += 1
        verdict = Admission.REJECT if sizes and not count else Admission.ADMIT
        assert gate.enter(sizes) == (verdict, count)
        inside += sizes[:count]
        assert gate.held == (len(inside), sum(inside))


@pytest.mark.parametrize("full_queue", ["drop", "throttle"])
def test_many_threads_never_pass_the_bounds(full_queue: str) -> None:
    gate = AdmissionGate(5, 100, full_queue, 0.005)  # type: ignore[arg-type]
    verdicts: Counter[Admission] = Counter()
    over: list[tuple[int, int]] = []
    lock = threading.Lock()

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(300):
            sizes = rng.integers(1, 30, rng.integers(1, 4)).tolist()
            verdict, count = gate.enter(sizes)
            held = gate.held
            if held[0] > 5 or held[1] > 100:
                over.append(held)
            with lock:
                verdicts[verdict] += 1
            gate.leave(count, sum(sizes[:count]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert over == []
    assert gate.held == (0, 0)
    assert verdicts.total() == 2_400
    assert full_queue == "throttle" or verdicts[Admission.THROTTLE] == 0
