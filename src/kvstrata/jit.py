"""The one door to Numba: every kernel is decorated with `kernel` from here.

Opening the door also makes llvmlite safe beside in-process vLLM. vLLM's CPU worker scans every
object of every loaded module for an instance dictionary; llvmlite's foreign-function library object
answers any attribute name, `__dict__` too, with a function wrapper, and the scan then fails with
"'_lib_fn_wrapper' object has no attribute 'get'". No native function has a dunder name, so answering
AttributeError for those is right for everybody.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from llvmlite.binding import ffi

F = TypeVar("F", bound=Callable[..., Any])


def _hide_dunders_of_native_library() -> None:
    library_type: Any = type(ffi.lib)
    original = library_type.__getattr__
    if getattr(original, "hides_dunders", False):
        return

    def __getattr__(self: Any, name: str) -> Any:  # noqa: N807
        if name.startswith("__"):
            raise AttributeError(name)
        return original(self, name)

    __getattr__.hides_dunders = True  # type: ignore[attr-defined]
    library_type.__getattr__ = __getattr__


_hide_dunders_of_native_library()


def kernel(function: F) -> F:
    """Compile on first use, keep the machine code on disk, run without the GIL."""
    return cast(F, numba.njit(cache=True, nogil=True)(function))


def holding_gil(function: F) -> F:
    """A kernel that keeps the GIL, and is never called by a `kernel`.

    Because it calls into the interpreter, or because it takes microseconds: to give the GIL up beside a
    busy thread costs 5 ms.
    """
    return cast(F, numba.njit(cache=True, nogil=False)(function))


def inlined(function: F) -> F:
    """A helper that is part of every kernel that calls it."""
    return cast(F, numba.njit(cache=True, nogil=True, inline="always")(function))


def part(function: F) -> F:
    """A kernel that only kernels call: without the doors to Python, whose compiling takes a second each."""
    made = numba.njit(cache=True, nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
    return cast(F, made(function))
