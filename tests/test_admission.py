"""AdmissionGate: its bounds hold, and throttled saves wait for room and not for ever."""

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
    assert gate.enter(2, 10) is Admission.ADMIT
    assert gate.enter(2, 10) is Admission.REJECT
    assert gate.enter(1, 10) is Admission.ADMIT
    assert gate.enter(1, 0) is Admission.REJECT
    assert gate.held == (3, 20)
    gate.leave(2, 10)
    assert gate.enter(2, 10) is Admission.ADMIT


def test_bytes_are_bounded() -> None:
    gate = AdmissionGate(100, 1_000, "drop", 0.0)
    assert gate.enter(1, 1_000) is Admission.ADMIT
    assert gate.enter(1, 1) is Admission.REJECT
    gate.leave(1, 1_000)
    assert gate.enter(1, 1_001) is Admission.REJECT
    assert gate.held == (0, 0)


def test_a_batch_enters_whole_or_not_at_all() -> None:
    gate = AdmissionGate(4, 1_000, "drop", 0.0)
    assert gate.enter(3, 30) is Admission.ADMIT
    assert gate.enter(2, 20) is Admission.REJECT
    assert gate.held == (3, 30)


def test_nothing_always_enters() -> None:
    gate = AdmissionGate(1, 1, "drop", 0.0)
    gate.enter(1, 1)
    assert gate.enter(0, 0) is Admission.ADMIT


def test_drop_never_waits() -> None:
    """Even with a waiting time: a thread that waited would never be freed here."""
    gate = AdmissionGate(1, 10, "drop", FOREVER_SECONDS * 60)
    assert gate.enter(1, 1) is Admission.ADMIT
    assert gate.enter(1, 1) is Admission.REJECT


def test_a_throttled_save_comes_in_when_there_is_room() -> None:
    gate = AdmissionGate(1, 10, "throttle", FOREVER_SECONDS)
    assert gate.enter(1, 4) is Admission.ADMIT
    verdicts: list[Admission] = []
    waiting = threading.Thread(target=lambda: verdicts.append(gate.enter(1, 5)))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive() and verdicts == []
    gate.leave(1, 4)
    waiting.join(FOREVER_SECONDS)
    assert verdicts == [Admission.THROTTLE]
    assert gate.held == (1, 5)


def test_a_throttled_save_gives_up() -> None:
    gate = AdmissionGate(1, 10, "throttle", 0.01)
    gate.enter(1, 1)
    assert gate.enter(1, 1) is Admission.REJECT
    assert gate.held == (1, 1)


def test_what_can_never_fit_does_not_wait() -> None:
    gate = AdmissionGate(2, 10, "throttle", FOREVER_SECONDS * 60)
    assert gate.enter(3, 1) is Admission.REJECT
    assert gate.enter(1, 11) is Admission.REJECT


def test_room_for_a_small_one_wakes_it_behind_a_large_one() -> None:
    gate = AdmissionGate(4, 100, "throttle", FOREVER_SECONDS)
    gate.enter(4, 4)
    verdicts: dict[int, Admission] = {}
    threads = [
        threading.Thread(target=lambda size=size: verdicts.update({size: gate.enter(size, size)}))
        for size in (3, 1)
    ]
    for thread in threads:
        thread.start()
    gate.leave(1, 1)
    threads[1].join(FOREVER_SECONDS)
    assert verdicts == {1: Admission.THROTTLE}
    gate.leave(3, 3)
    threads[0].join(FOREVER_SECONDS)
    assert verdicts == {1: Admission.THROTTLE, 3: Admission.THROTTLE}


def test_leaving_more_than_entered_is_an_assertion() -> None:
    gate = AdmissionGate(2, 10, "drop", 0.0)
    gate.enter(1, 5)
    with pytest.raises(AssertionError):
        gate.leave(2, 5)


@given(
    steps=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 50), st.booleans()), max_size=60),
    max_blocks=st.integers(1, 8),
    max_bytes=st.integers(1, 80),
)
def test_any_sequence_is_what_arithmetic_says(
    steps: list[tuple[int, int, bool]], max_blocks: int, max_bytes: int
) -> None:
    gate = AdmissionGate(max_blocks, max_bytes, "drop", 0.0)
    inside: list[tuple[int, int]] = []
    for blocks, size, leaves in steps:
        if leaves and inside:
            gate.leave(*inside.pop(0))
        held = (sum(b for b, _ in inside), sum(s for _, s in inside))
        fits = held[0] + blocks <= max_blocks and held[1] + size <= max_bytes
        assert gate.enter(blocks, size) is (Admission.ADMIT if fits else Admission.REJECT)
        if fits:
            inside.append((blocks, size))
        assert gate.held == (sum(b for b, _ in inside), sum(s for _, s in inside))


@pytest.mark.parametrize("full_queue", ["drop", "throttle"])
def test_many_threads_never_pass_the_bounds(full_queue: str) -> None:
    gate = AdmissionGate(5, 100, full_queue, 0.005)  # type: ignore[arg-type]
    verdicts: Counter[Admission] = Counter()
    over: list[tuple[int, int]] = []
    lock = threading.Lock()

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(300):
            blocks, size = int(rng.integers(1, 4)), int(rng.integers(1, 60))
            verdict = gate.enter(blocks, size)
            held = gate.held
            if held[0] > 5 or held[1] > 100:
                over.append(held)
            with lock:
                verdicts[verdict] += 1
            if verdict is not Admission.REJECT:
                gate.leave(blocks, size)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert over == []
    assert gate.held == (0, 0)
    assert verdicts.total() == 2_400
    assert full_queue == "throttle" or verdicts[Admission.THROTTLE] == 0
