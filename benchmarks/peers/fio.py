"""fio with io_uring: what the folder can do without anybody's software.

Its buffers lie on huge pages (glibc's tunable and an alignment of 2 MiB), or on pages of 4 KiB as without
them. A run lasts a fixed time after a short ramp, in which its buffers are touched for the first time.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from kvstrata.transfer.buffers import Arena
from peers.base import PeerError, written_file

RAMP_MS = 150


class Speed(NamedTuple):
    seconds_per_gb: float
    cpu_seconds_per_gb: float


def installed() -> str | None:
    """fio's version, None without it."""
    if not shutil.which("fio"):
        return None
    return subprocess.run(["fio", "--version"], check=True, capture_output=True, text=True).stdout.strip()


class Fio:
    """One working file, written once."""

    def __init__(self, folder: Path, block_bytes: int, blocks: int, depth: int, arena: Arena) -> None:
        self.path = folder / "fio.bin"
        self.block_bytes, self.depth, self.size = block_bytes, depth, blocks * block_bytes
        with written_file(self.path, self.size, arena) as fd:
            # fio wants O_DIRECT or nothing; a file system without it got a plain descriptor.
            self.direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)

    def speed(self, cell: str, *, seconds: float, huge: bool = True) -> Speed:
        """Of one run. cell: write, read, scattered, or mixed."""
        ways = {"write": "write", "read": "read", "scattered": "randread", "mixed": "rw"}
        job = self._run(
            ["--name=benchmark", f"--rw={ways[cell]}", f"--iodepth={self.depth}", "--rwmixread=70"],
            seconds,
            huge=huge,
        )[0]
        moved = job["read"]["io_bytes"] + job["write"]["io_bytes"]
        # The slower direction of a mix is the run's; one that moved nothing says 0.
        took = max(job["read"]["runtime"], job["write"]["runtime"]) / 1e3
        cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3
        if not moved:
            raise PeerError("fio moved nothing")
        return Speed(took / moved * 1e9, cpu / moved * 1e9)

    def latency(self, *, seconds: float, stores: bool) -> tuple[dict[str, float], float]:
        """Seconds of a single random read at p50 and p99, alone or beside writes, and the writes' GB/s."""
        jobs = ["--name=load", "--rw=randread", "--iodepth=1"]
        if stores:
            jobs += ["--name=store", "--rw=write", f"--iodepth={self.depth}"]
        done = self._run(jobs, seconds, huge=True)
        percentiles = done[0]["read"]["clat_ns"]["percentile"]
        figures = {"p50": percentiles["50.000000"] / 1e9, "p99": percentiles["99.000000"] / 1e9}
        return figures, done[1]["write"]["bw_bytes"] / 1e9 if stores else 0.0

    def _run(self, jobs: list[str], seconds: float, *, huge: bool) -> list[dict[str, Any]]:
        command = [
            "fio", f"--filename={self.path}", f"--size={self.size}", f"--bs={self.block_bytes}",
            f"--direct={int(self.direct)}", "--ioengine=io_uring", "--allow_file_create=0", "--time_based",
            f"--runtime={int(seconds * 1e3)}ms", f"--ramp_time={RAMP_MS}ms", "--end_fsync=1",
            "--scramble_buffers=0", "--output-format=json", *(["--mem_align=2m"] if huge else []), *jobs,
        ]  # fmt: skip
        tunables = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if huge else {}
        answer = subprocess.run(
            command, env=os.environ | tunables, check=False, capture_output=True, text=True
        )
        if answer.returncode:
            raise PeerError(f"fio failed: {answer.stderr.strip()[-200:]}")
        found: list[dict[str, Any]] = json.loads(answer.stdout[answer.stdout.index("{") :])["jobs"]
        return found

    def close(self) -> None:
        self.path.unlink(missing_ok=True)
