"""The servers as pytest fixtures: one of a kind for a whole process, a folder or bucket for each test.

What a machine lacks skips the test and says what to install. A test that kills a server starts it again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import pytest

from backends import BackendMissing
from backends.faultfs import FaultFs, fault_fs
from backends.gluster import GlusterMount, GlusterVolume, gluster_volume
from backends.loopfs import LoopFs, loop_fs
from backends.mooncake import MooncakeMaster, mooncake_master
from backends.radosgw import RadosGateway, S3Account, rados_gateway

SMALL_BYTES = 16 << 20

_T = TypeVar("_T")
_numbers = itertools.count()


@contextlib.contextmanager
def or_skip(backend: AbstractContextManager[_T]) -> Iterator[_T]:
    """A server, or the test is skipped with the reason."""
    with contextlib.ExitStack() as stack:
        try:
            value = stack.enter_context(backend)
        except BackendMissing as e:
            pytest.skip(str(e))
        yield value


@pytest.fixture(scope="session")
def gluster() -> Iterator[tuple[GlusterVolume, list[GlusterMount]]]:
    """A volume and two mounts of it."""
    with or_skip(gluster_volume()) as volume:
        yield volume


@pytest.fixture
def shared_folders(gluster: tuple[GlusterVolume, list[GlusterMount]]) -> tuple[Path, Path]:
    """One empty folder, as each of two members sees it."""
    name = f"test{next(_numbers)}"
    first, second = (mount.path / name for mount in gluster[1])
    first.mkdir()
    return first, second


@pytest.fixture(scope="session")
def s3_server() -> Iterator[RadosGateway]:
    with or_skip(rados_gateway()) as gateway:
        yield gateway


@pytest.fixture
def s3_account(s3_server: RadosGateway) -> S3Account:
    """An empty bucket."""
    account = dataclasses.replace(s3_server.account, bucket=f"test{next(_numbers)}")
    s3_server.make_bucket(account.bucket)
    return account


@pytest.fixture(scope="session")
def mooncake() -> Iterator[MooncakeMaster]:
    """A master; each test joins with names of its own."""
    with or_skip(mooncake_master()) as master:
        yield master


@pytest.fixture
def faults() -> Iterator[FaultFs]:
    """An empty folder that fails on command."""
    with or_skip(fault_fs()) as mount:
        yield mount


@pytest.fixture
def small_fs() -> Iterator[LoopFs]:
    """A file system of SMALL_BYTES."""
    with or_skip(loop_fs(SMALL_BYTES)) as mount:
        yield mount
