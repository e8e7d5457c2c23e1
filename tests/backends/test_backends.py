"""Each kit does what the tests that use it rely on: sharing, faults on command, leaving nothing behind."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backends import PACKAGES, BackendMissing, install_command, require_command
from backends.faultfs import OPERATIONS, FaultFs, fault_fs
from backends.fixtures import or_skip
from backends.gluster import GlusterMount, GlusterVolume, gluster_volume
from backends.loopfs import LoopFs
from backends.mooncake import MooncakeMaster
from backends.netns import Network, command_in, entered
from backends.radosgw import RadosGateway, S3Account
from backends.workplace import (
    NAMESPACES,
    ROOT,
    Workplace,
    is_mounted,
    mount_points,
    runs,
    start_time,
    sweep,
)

MIB = 1 << 20
WAIT_SECONDS = 60.0
Gluster = tuple[GlusterVolume, list[GlusterMount]]


@contextlib.contextmanager
def fails(error: int) -> Iterator[None]:
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        yield
    assert caught.value.errno == error, caught.value


def eventually(action: Callable[[], object]) -> None:
    """Clients find a server again by themselves, a little later."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            action()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        else:
            return


def test_a_missing_package_names_the_command_that_installs_it() -> None:
    with pytest.raises(BackendMissing, match="apt-get install some-package"):
        require_command("no-such-command-anywhere", "some-package")
    assert install_command().split()[-len(PACKAGES) :] == list(PACKAGES)


OWNER = """
import sys, threading
from backends.faultfs import FaultFs
from backends.loopfs import LoopFs
from backends.netns import Network
from backends.workplace import Workplace
place = Workplace("victim")
network = Network(place)
network.join_host(10**8)
network.join("member", 10**8)
below = place.folder / "below"
below.mkdir()
(below / "file").write_bytes(b"x")
loop = Workplace("victim")
LoopFs(loop, 1 << 20)
faults = FaultFs(place, below)
faults.hang("read")
threading.Thread(target=(faults.path / "file").read_bytes).start()
faults.await_hanging(1)
print(place.name, loop.name, flush=True)
sys.stdin.read()
"""


def test_the_next_start_removes_what_a_killed_owner_left() -> None:
    with or_skip(Workplace("sweeper")), or_skip(fault_fs()):
        pass
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    started = start_time(owner.pid)
    assert owner.stdout is not None
    names = owner.stdout.readline().split()
    assert len(names) == 2
    assert all(mount_points(ROOT / name) for name in names)
    assert len(list(NAMESPACES.glob(f"{names[0]}-*"))) == 2
    # One of its threads hangs in the kernel: it cannot wholly die before the file system has gone.
    owner.send_signal(signal.SIGKILL)
    while runs(owner.pid, started):
        time.sleep(0.01)
    sweep()
    owner.communicate()
    for name in names:
        assert not (ROOT / name).exists()
        assert not mount_points(ROOT / name)
        assert not list(NAMESPACES.glob(f"{name}-*"))


def test_a_network_limits_cuts_and_mends_a_members_link() -> None:
    with or_skip(Workplace("network")) as place:
        network = Network(place)
        member = network.join("member", 25_000_000)
        shown = place.run(command_in(member, ["tc", "qdisc", "show"]))
        assert "rate 200Mbit" in shown
        network.limit("member", None)
        assert "tbf" not in place.run(command_in(member, ["tc", "qdisc", "show"]))
        with entered(network.server):
            server = socket.create_server((network.address, 0))
        with server, entered(member):
            with socket.create_connection(server.getsockname()):
                pass
            network.cut("member")
            with pytest.raises(TimeoutError), socket.socket() as lost:
                lost.settimeout(0.2)
                lost.connect(server.getsockname())
            network.mend("member")
            with socket.create_connection(server.getsockname()):
                pass


def test_a_second_mount_sees_what_the_first_wrote(
    shared_folders: tuple[Path, Path], gluster: Gluster
) -> None:
    first, second = shared_folders
    data = os.urandom(MIB)
    (first / "part").write_bytes(data)
    (first / "part").rename(first / "whole")
    assert (second / "whole").read_bytes() == data
    assert len({mount.namespace for mount in gluster[1]}) == 2


def test_a_volume_survives_the_death_of_server_and_client(
    shared_folders: tuple[Path, Path], gluster: Gluster
) -> None:
    (first, second), (volume, mounts) = shared_folders, gluster
    (first / "file").write_bytes(b"before")
    volume.kill_server()
    with fails(errno.ENOTCONN):
        (first / "other").write_bytes(b"")
    volume.start_server()
    eventually(lambda: (first / "file").write_bytes(b"after"))
    eventually((second / "file").read_bytes)
    mounts[1].kill()
    with fails(errno.ENOTCONN):
        (second / "file").read_bytes()
    mounts[1].mount()
    assert (second / "file").read_bytes() == b"after"
    mounts[1].unmount()
    assert not second.exists()
    mounts[1].mount()
    assert (second / "file").read_bytes() == b"after"


def test_calls_on_a_frozen_server_return_once_it_goes_on(
    shared_folders: tuple[Path, Path], gluster: Gluster
) -> None:
    returned = threading.Event()

    def write() -> None:
        (shared_folders[0] / "file").write_bytes(b"x")
        returned.set()

    gluster[0].freeze_server()
    writer = threading.Thread(target=write)
    writer.start()
    assert not returned.wait(0.3)
    gluster[0].thaw_server()
    assert returned.wait(WAIT_SECONDS)
    writer.join()


def test_a_dispersed_volume_serves_with_a_dead_brick() -> None:
    with or_skip(gluster_volume(1, bricks=3, redundancy=1)) as (volume, (mount,)):
        data = os.urandom(MIB)
        (mount.path / "file").write_bytes(data)
        volume.kill_brick(0)
        assert (mount.path / "file").read_bytes() == data
        (mount.path / "other").write_bytes(data)
        volume.revive_bricks()
        assert (mount.path / "other").read_bytes() == data


def test_s3_refuses_to_replace_and_outlives_its_gateway(
    s3_account: S3Account, s3_server: RadosGateway
) -> None:
    obstore = pytest.importorskip("obstore")
    from obstore.exceptions import AlreadyExistsError
    from obstore.store import S3Store

    store = S3Store(**s3_account.options())
    data = os.urandom(MIB)
    obstore.put(store, "a/extent", data, mode="create")
    with pytest.raises(AlreadyExistsError):
        obstore.put(store, "a/extent", b"other", mode="create")
    assert obstore.get_range(store, "a/extent", start=1000, end=2000).to_bytes() == data[1000:2000]
    s3_server.kill()
    quick = S3Store(**s3_account.options(), retry_config={"max_retries": 0})
    with pytest.raises(Exception, match="onnect"):
        obstore.get(quick, "a/extent")
    s3_server.start()
    assert obstore.get(store, "a/extent").bytes().to_bytes() == data


POOL_MEMBER = """
import sys
from backends.mooncake import MooncakeMember
store = MooncakeMember(*sys.argv[1:4]).connect(segment_bytes=64 << 20)
for line in sys.stdin:
    verb, key = line.split()
    data = key.encode() * ((4 << 20) // len(key))
    print(store.put(key, data) if verb == "put" else store.get(key) == data, flush=True)
"""


def test_mooncake_hands_a_value_from_member_to_member_and_comes_back(mooncake: MooncakeMaster) -> None:
    def member(name: str) -> subprocess.Popen[str]:
        joined = mooncake.join(name)
        words = [sys.executable, "-c", POOL_MEMBER, joined.namespace, joined.address, joined.master]
        return subprocess.Popen(
            command_in(joined.namespace, words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )

    def ask(process: subprocess.Popen[str], request: str) -> str:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(request + "\n")
        process.stdin.flush()
        while (answer := process.stdout.readline().strip()) not in ("True", "False") and not (
            answer.lstrip("-").isdigit()
        ):
            assert answer or process.poll() is None
        return answer

    members = member("giver"), member("taker")
    try:
        assert ask(members[0], "put key1") == "0"
        assert ask(members[1], "get key1") == "True"
        mooncake.kill()
        assert ask(members[0], "put key2") != "0"
        mooncake.start()
        # Each client finds the new master when it next tries.
        deadline = time.monotonic() + WAIT_SECONDS
        while ask(members[0], "put key2") != "0" or ask(members[1], "get key2") != "True":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert ask(members[1], "get key1") == "False"
    finally:
        for process in members:
            process.kill()
            process.communicate()


def test_without_rules_it_is_an_ordinary_folder(faults: FaultFs) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    file, other = faults.path / "file", faults.path / "other"
    file.write_bytes(bytes(MIB))
    other.write_bytes(b"other")
    os.utime(file, ns=(1, 2))
    assert file.stat().st_mtime_ns == 2
    file.touch()
    assert file.stat().st_mtime_ns == (faults.below / "file").stat().st_mtime_ns > 10**18
    assert libc.renameat2(-100, bytes(file), -100, bytes(other), 1) == -1
    assert ctypes.get_errno() == errno.EEXIST
    with file.open("r+b") as opened:
        other.rename(file)
        opened.truncate(100)
        assert os.fstat(opened.fileno()).st_size == 100
        assert len(opened.read()) == 100
    assert file.read_bytes() == b"other"
    assert {path.name for path in faults.path.iterdir()} == {"file"}


def test_a_fault_comes_as_asked_and_goes(faults: FaultFs) -> None:
    file = faults.path / "file"
    file.write_bytes(b"x" * 10)
    faults.fail("write", errno.ENOSPC, times=1)
    with fails(errno.ENOSPC):
        file.write_bytes(b"y")
    file.write_bytes(b"y")
    faults.fail("read", errno.EIO, path="*.bad")
    assert file.read_bytes() == b"y"
    (faults.path / "a.bad").write_bytes(b"z")
    with fails(errno.EIO):
        (faults.path / "a.bad").read_bytes()
    faults.heal()
    assert (faults.path / "a.bad").read_bytes() == b"z"


@pytest.mark.parametrize(
    ("operation", "error", "call"),
    [
        ("open", errno.ESTALE, lambda folder: (folder / "file").read_bytes()),
        ("create", errno.EROFS, lambda folder: (folder / "new").touch()),
        ("rename", errno.EIO, lambda folder: (folder / "file").rename(folder / "other")),
        ("unlink", errno.EROFS, lambda folder: (folder / "file").unlink()),
        ("readdir", errno.EIO, lambda folder: list(folder.iterdir())),
        ("getattr", errno.ESTALE, lambda folder: (folder / "file").stat()),
        ("link", errno.EROFS, lambda folder: (folder / "second").hardlink_to(folder / "file")),
    ],
)
def test_any_call_can_fail(
    faults: FaultFs, operation: str, error: int, call: Callable[[Path], object]
) -> None:
    (faults.path / "file").write_bytes(b"x")
    number = faults.fail(operation, error)
    with fails(error):
        call(faults.path)
    assert faults.struck()[operation] >= 1
    faults.remove(number)
    call(faults.path)


def test_fsync_can_fail_and_the_second_write_only(faults: FaultFs) -> None:
    faults.fail("fsync", errno.EIO)
    faults.fail("write", errno.ENOSPC, skip=1)
    descriptor = os.open(faults.path / "file", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    try:
        buffer = bytes(4096)
        assert os.write(descriptor, buffer) == 4096
        with fails(errno.ENOSPC):
            os.write(descriptor, buffer)
        with fails(errno.EIO):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def hanging_read(faults: FaultFs) -> Iterator[list[object]]:
    """A thread whose read hangs; what it got stands in the list afterwards."""
    results: list[object] = []

    def read() -> None:
        try:
            results.append((faults.path / "file").read_bytes())
        except OSError as e:
            results.append(e.errno)

    (faults.path / "file").write_bytes(b"x")
    reader = threading.Thread(target=read)
    faults.hang("read", times=1)
    reader.start()
    faults.await_hanging(1)
    (faults.path / "other").write_bytes(b"other calls go on")
    assert not results
    yield results
    reader.join(WAIT_SECONDS)


def test_a_call_hangs_until_it_is_let_go(faults: FaultFs) -> None:
    with hanging_read(faults) as results:
        faults.heal()
    assert results == [b"x"]


def test_a_call_hangs_until_the_mount_dies(faults: FaultFs) -> None:
    with hanging_read(faults) as results:
        faults.kill()
    assert results == [errno.ENOTCONN]
    with fails(errno.ENOTCONN):
        list(faults.path.iterdir())
    faults.mount()
    assert (faults.path / "file").read_bytes() == b"x"
    faults.unmount()
    assert not is_mounted(faults.path)
    assert list(faults.path.iterdir()) == []


def test_calls_are_counted_and_slowed_by_kind(faults: FaultFs) -> None:
    (faults.path / "file").write_bytes(b"x")
    faults.reset()
    faults.delay(OPERATIONS, 0.05)
    (faults.path / "file").read_bytes()
    counts = faults.counts()
    assert (counts["open"], counts["read"], counts["release"]) == (1, counts["read"], 1)
    assert counts["read"] >= 1
    assert "write" not in counts
    assert faults.struck() == counts


def test_a_small_file_system_is_really_full_and_really_read_only(small_fs: LoopFs) -> None:
    with fails(errno.ENOSPC):
        (small_fs.path / "file").write_bytes(bytes(17 * MIB))
    (small_fs.path / "file").write_bytes(b"x")
    small_fs.remount(read_only=True)
    with fails(errno.EROFS):
        (small_fs.path / "other").touch()
    assert (small_fs.path / "file").read_bytes() == b"x"
    small_fs.unmount()
    assert not (small_fs.path / "file").exists()
    small_fs.mount()
    assert (small_fs.path / "file").read_bytes() == b"x"
