"""What compiled kernels need of the machine: system calls, memory by address, and atomic words.

Kernels run without the GIL, so they share words with other threads. A word that two threads touch is an
element of an int64 array and is read and written through the atomic functions here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

from kvstrata.jit import inlined

intrinsic: Callable[[Any], Any] = _intrinsic
_int, _long, _word = types.int32, types.int64, types.int64

preadv = types.ExternalFunction("preadv", _long(_int, _word, _int, _long))
"""fd, address of iovecs, their number, offset: bytes read, or -1 and `errno`."""
pwritev = types.ExternalFunction("pwritev", _long(_int, _word, _int, _long))
fdatasync = types.ExternalFunction("fdatasync", _int(_int))
memcpy = types.ExternalFunction("memcpy", _word(_word, _word, _word))
system_call = types.ExternalFunction("syscall", _long(_long, _long, _long, _long, _long, _long, _long))
"""The C library's syscall(number, six arguments): -1 and `errno` on failure."""
_errno_location = types.ExternalFunction("__errno_location", _word())


@intrinsic
def load_i32(typing: Any, address: Any) -> Any:
    """The 32-bit integer at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(32).as_pointer())
        return builder.load(pointer)

    return types.int32(types.int64), generate


@intrinsic
def load_i64(typing: Any, address: Any) -> Any:
    """The 64-bit integer at an address, which need not be aligned."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load(pointer, align=1)

    return types.int64(types.int64), generate


@intrinsic
def store_i64(typing: Any, address: Any, value: Any) -> Any:
    """Write a 64-bit integer to an address, which need not be aligned."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        builder.store(args[1], pointer, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _element(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    made = context.make_array(array_type)(context, builder, array)
    return cgutils.get_item_pointer(context, builder, array_type, made, [index], wraparound=False)


@intrinsic
def atomic_load(typing: Any, array: Any, index: Any) -> Any:
    """array[index], and whatever the thread that stored it had written before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _element(context, builder, signature.args[0], args[0], args[1])
        return builder.load_atomic(pointer, "acquire", array.dtype.bitwidth // 8)

    return array.dtype(array, types.int64), generate


@intrinsic
def atomic_store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] = value, after everything that this thread wrote before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _element(context, builder, signature.args[0], args[0], args[1])
        builder.store_atomic(args[2], pointer, "release", array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.int64, array.dtype), generate


@intrinsic
def atomic_add(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] += value; returns what was there before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _element(context, builder, signature.args[0], args[0], args[1])
        return builder.atomic_rmw("add", pointer, args[2], "seq_cst")

    return array.dtype(array, types.int64, array.dtype), generate


mutex_lock = types.ExternalFunction("pthread_mutex_lock", _int(_word))
mutex_unlock = types.ExternalFunction("pthread_mutex_unlock", _int(_word))
"""A mutex or a condition is zeroed memory at an address, 64 bytes of it at least."""
condition_wait = types.ExternalFunction("pthread_cond_wait", _int(_word, _word))
condition_wait_until = types.ExternalFunction("pthread_cond_clockwait", _int(_word, _word, _int, _word))
"""A clock and the address of a timespec of it come last; not 0 when that time has come (glibc 2.30)."""
condition_signal = types.ExternalFunction("pthread_cond_signal", _int(_word))
condition_broadcast = types.ExternalFunction("pthread_cond_broadcast", _int(_word))
sleep_microseconds = types.ExternalFunction("usleep", _int(types.uint32))
read_bytes = types.ExternalFunction("read", _long(_int, _word, _word))
write_bytes = types.ExternalFunction("write", _long(_int, _word, _word))
fill_bytes = types.ExternalFunction("memset", _word(_word, _int, _word))
_clock_gettime = types.ExternalFunction("clock_gettime", _int(_int, _word))

CLOCK_MONOTONIC = 1


@inlined
def last_error() -> Any:
    """errno of this thread."""
    return load_i32(_errno_location())


@inlined
def monotonic_ns(scratch: int) -> Any:
    """Nanoseconds of the clock of time.monotonic. scratch: address of 16 bytes to use."""
    _clock_gettime(CLOCK_MONOTONIC, scratch)
    return load_i64(scratch) * 1_000_000_000 + load_i64(scratch + 8)


@intrinsic
def call_hook(typing: Any, hook: Any, op: Any, fd: Any, vectors: Any, count: Any, offset: Any) -> Any:
    """Call the C function at address `hook` with (op, fd, address of iovecs, their number, offset)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(word, [word] * 5)
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    word = types.int64
    return word(word, word, word, word, word, word), generate
