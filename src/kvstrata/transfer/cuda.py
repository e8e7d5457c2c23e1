"""Memory that a GPU copies from and to directly: registered with the CUDA driver, if there is one.

Talks to libcuda.so.1 itself, so that nothing of CUDA has to be installed. Not run on CUDA hardware yet:
what tests cover is that everything works without it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

LIBRARY = "libcuda.so.1"
_PORTABLE = 1
"""CU_MEMHOSTREGISTER_PORTABLE: pinned for every context of the process, whichever GPU it is for."""
_FUNCTIONS = (
    "cuGetErrorName",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDevicePrimaryCtxGetState",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
)


class PinError(Exception):
    """Memory was not registered, and why."""


def load_driver(library: str = LIBRARY) -> ctypes.CDLL:
    """The driver's library. Raises PinError if there is none."""
    try:
        driver = ctypes.CDLL(library)
    except OSError as error:
        raise PinError(f"no CUDA driver: {error}") from None
    missing = [name for name in _FUNCTIONS if not hasattr(driver, name)]
    if missing:
        raise PinError(f"{library} has no {missing[0]}")
    return driver


class Pinned:
    """Registered memory, until `release`. The memory must stay mapped until then."""

    def __init__(self, driver: ctypes.CDLL, address: int, size: int) -> None:
        """Register `size` bytes from `address`; touches every page. Raises PinError.

        With the primary context of a GPU that this process uses already. CUDA is not begun for it: a
        context costs memory of the GPU, and a process that forks afterwards must not have one.
        """
        self._driver = driver
        self._address = ctypes.c_void_p(address)
        self._device = self._choose_device()
        self._context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        try:
            with self._current():
                self._call("cuMemHostRegister_v2", self._address, ctypes.c_size_t(size), _PORTABLE)
        except PinError:
            self._driver.cuDevicePrimaryCtxRelease_v2(self._device)
            raise

    def _choose_device(self) -> ctypes.c_int:
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        if count.value < 1:
            raise PinError("no GPU")
        devices = [ctypes.c_int() for _ in range(count.value)]
        for ordinal, device in enumerate(devices):
            self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        flags, active = ctypes.c_uint(), ctypes.c_int()
        for device in devices:
            state = (ctypes.byref(flags), ctypes.byref(active))
            self._call("cuDevicePrimaryCtxGetState", device, *state)
            if active.value:
                return device
        raise PinError("this process uses no GPU")

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Calls on memory need a current context; the one that this thread had comes back."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorName(code, ctypes.byref(text))
            raise PinError(f"{name}: {text.value.decode() if text.value else code}")

    def release(self) -> None:
        """Take the registration back. Raises PinError."""
        try:
            with self._current():
                self._call("cuMemHostUnregister", self._address)
        finally:
            self._driver.cuDevicePrimaryCtxRelease_v2(self._device)
