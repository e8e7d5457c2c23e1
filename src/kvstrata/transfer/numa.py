"""Where the pages of a stretch of memory may lie on a machine of several NUMA nodes.

Says it to the kernel with mbind(2), before the pages are touched. libnuma is not needed for that.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

SYSFS = Path("/sys/devices/system/node")
MAX_NODES = 1024
"""What the largest kernels are built for; a larger number is a mistake."""

PREFERRED, INTERLEAVE = 1, 3
"""MPOL_PREFERRED and MPOL_INTERLEAVE. Never MPOL_BIND: it ends the process when the node is full."""
_SYS_MBIND = {"x86_64": 237, "aarch64": 235, "riscv64": 235, "ppc64le": 259, "s390x": 268}
_WORD_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)


@dataclass(frozen=True, slots=True)
class NumaPolicy:
    """mode: PREFERRED (of one node) or INTERLEAVE. nodes: ascending."""

    mode: int
    nodes: tuple[int, ...]

    def __str__(self) -> str:
        names = ", ".join(map(str, self.nodes))
        return f"interleaved over nodes {names}" if self.mode == INTERLEAVE else f"on node {names}"


def parse_list(text: str) -> list[int]:
    """The kernel's lists: "0-2,5" -> [0, 1, 2, 5]; empty for an empty text. Raises ValueError."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, dash, last = part.partition("-")
        low, high = int(first), int(last if dash else first)
        if not 0 <= low <= high < 2**20:
            raise ValueError(f"{part!r} is not a range of numbers")
        numbers.update(range(low, high + 1))
    return sorted(numbers)


def nodes_of(cpus: Set[int], sysfs: Path = SYSFS) -> list[int]:
    """Nodes that have memory and one of the CPUs; none where the system does not say."""
    try:
        memory = parse_list((sysfs / "has_memory").read_text())
        return [
            node
            for node in memory
            if not cpus.isdisjoint(parse_list((sysfs / f"node{node}" / "cpulist").read_text()))
        ]
    except (OSError, ValueError):
        return []


def choose(wish: str, cpus: Set[int] | None = None, sysfs: Path = SYSFS) -> NumaPolicy | None:
    """The policy for "auto", "interleave", "off" or a node's number; None: leave it to the kernel.

    cpus: those of this process by default. "auto" interleaves where there are several nodes, because
    the threads that move blocks run on all of them.
    """
    if wish == "off":
        return None
    if wish.isdecimal():
        return NumaPolicy(PREFERRED, (int(wish),))
    nodes = nodes_of(os.sched_getaffinity(0) if cpus is None else cpus, sysfs)
    if not nodes or (wish == "auto" and len(nodes) == 1):
        return None
    return NumaPolicy(INTERLEAVE, tuple(nodes))


def apply(policy: NumaPolicy, address: int, size: int) -> None:
    """Give `size` bytes from `address`, which begins a page, a policy. Raises OSError."""
    number = _SYS_MBIND.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"mbind is not known on {platform.machine()}")
    words = (ctypes.c_ulong * (max(policy.nodes) // _WORD_BITS + 1))()
    for node in policy.nodes:
        words[node // _WORD_BITS] |= 1 << node % _WORD_BITS
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    # The kernel looks at one bit less than it is told.
    arguments = (address, size, policy.mode, ctypes.addressof(words), len(words) * _WORD_BITS + 1, 0)
    if libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
