"""Threads that come back from compiled code must have stopped when the interpreter ends.

A daemon thread that asks for the GIL then is ended by unwinding its stack. Numba's dispatcher cannot be
unwound: the process would abort. So threads that call kernels are told to stop a moment before.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Protocol

STOP_SECONDS = 1.0
"""For all of them. One that hangs outside of Python is no danger."""


class Leaver(Protocol):
    """Has threads that call kernels again and again."""

    def leave(self) -> Sequence[threading.Thread]:
        """Tell them to stop; those that will."""


_leavers: weakref.WeakSet[Leaver] = weakref.WeakSet()


def before_exit(leaver: Leaver) -> None:
    """Ask it to leave when the interpreter is about to end, if it is still there."""
    _leavers.add(leaver)


@atexit.register
def _leave() -> None:
    until = time.monotonic() + STOP_SECONDS
    for thread in [thread for leaver in list(_leavers) for thread in leaver.leave()]:
        thread.join(max(0.0, until - time.monotonic()))
