"""strace logs: a real one of a small program (tests/data/strace_cache.c), and lines by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstrata.errors import ConfigError, TraceFormatError
from kvstrata.traces import strace
from kvstrata.traces.trace import Trace

LOG = Path(__file__).parents[1] / "data" / "strace_cache.log"
K = 1024


def requests(trace: Trace) -> list[tuple[str, list[int]]]:
    """(operation, ids) of every request."""
    labels = trace.head.labels["operation"]
    operation = [labels[code] for code in trace.features["operation"]]
    return [
        (operation[r], trace.ids[trace.starts[r] : trace.starts[r + 1]].tolist())
        for r in range(trace.head.requests)
    ]


def by_hand(tmp_path: Path, *calls: str, **options: object) -> list[tuple[str, list[int]]]:
    """Requests of these lines, each stamped with the next millisecond unless it has its own time."""
    path = tmp_path / "hand.log"
    stamped = [
        call
        if call[:1] in "[0123456789" or call.startswith("strace: ")
        else f"7 1700000000.{place:03}000 {call}"
        for place, call in enumerate(calls)
    ]
    path.write_text("".join(f"{line}\n" for line in stamped))
    return requests(strace.read(path, **{"extent_bytes": 4096, **options}))  # type: ignore[arg-type]


def opened(name: str, fd: int = 3, flags: str = "O_RDWR|O_CREAT") -> str:
    return f'openat(AT_FDCWD</c>, "{name}", {flags}, 0600) = {fd}</c/{name}> <0.000010>'


def test_real_log() -> None:
    trace = strace.read(LOG, prefix="/tmp/kvlog/cache", extent_bytes=64 * K)
    found = requests(trace)
    assert found[:3] == [("write", [0, 1, 2, 3]), ("write", [3, 4]), ("read", [2])]
    assert sorted(found[3:11]) == sorted(("read", [extent]) for extent in (0, 1, 2, 3) for _ in "ab")
    assert found[11:] == [
        ("read", [2]),  # the child goes on where the parent was
        ("read", [2]),
        ("read", [0, 1, 2]),
        ("write", [5]),
        ("write", [5]),
        ("write", [5]),
        ("read", [1]),
        ("write", [6]),
        ("read", [2]),
        ("write", [7]),
        ("read", [0]),  # of the file that has no name any more
        ("write", [8]),
        ("write", [9]),
        ("read", [9]),
    ]
    sizes = [64 * K] * 4 + [300_000 - 256 * K, 16, 64 * K, 1000, 50, 5]
    assert trace.size.tolist() == sizes
    assert trace.parent.tolist() == [-1] * 10
    assert trace.head.source_format == "strace"
    assert trace.head.skipped == 0
    assert (trace.time_s[1:] >= trace.time_s[:-1]).all()
    assert 0 < trace.time_s[-1] < 1


def test_default_filter_keeps_the_systems_files_out() -> None:
    inside = strace.read(LOG, prefix="/tmp/kvlog")
    assert strace.read(LOG).head.accesses == inside.head.accesses
    system = strace.read(LOG, prefix="/usr/lib")
    assert system.head.accesses >= 3
    with pytest.raises(TraceFormatError, match=r"strace_cache\.log: no requests"):
        strace.read(LOG, prefix="/tmp/kvlog/cac")


def test_whole_files_as_blocks() -> None:
    trace = strace.read(LOG, prefix="/tmp/kvlog/cache", extent_bytes=1 << 40)
    assert trace.size.tolist() == [300_000, 16, 64 * K + 1000, 50, 5]
    assert trace.head.accesses == trace.head.requests


def test_unfinished_calls_of_threads(tmp_path: Path) -> None:
    found = by_hand(
        tmp_path,
        "[pid    11] 1700000000.000001 " + opened("f", flags="O_RDWR"),
        "[pid    11] 1700000000.000002 read(3</c/f>,  <unfinished ...>",
        '[pid    12] 1700000000.000003 pread64(3</c/f>, "x"..., 4096, 12288 <unfinished ...>',
        '[pid    11] 1700000000.000004 <... read resumed>"a, b) = 9"..., 8192) = 8192 <0.000002>',
        "[pid    12] 1700000000.000005 <... pread64 resumed> ) = 10 <0.000002>",
        "[pid    12] 1700000000.000006 <... futex resumed>) = 0 <0.1>",
        '[pid    12] 1700000000.000007 read(3</c/f>, "x"..., 1) = 1 <0.000002>',
        "[pid    11] 1700000000.000008 read(3</c/f>,  <unfinished ...>",
    )
    assert found == [("read", [0, 1]), ("read", [2]), ("read", [3])]


def test_generations(tmp_path: Path) -> None:
    found = by_hand(
        tmp_path,
        opened("f"),
        'write(3</c/f>, "x"..., 10) = 10 <0.000001>',  # 0
        opened("f", 4, "O_WRONLY|O_TRUNC"),
        'pwrite64(3</c/f>, "x"..., 10, 0) = 10 <0.000001>',  # 1
        "ftruncate(3</c/f>, 0) = 0 <0.000001>",
        'pread64(4</c/f>, "x"..., 10, 0) = 10 <0.000001>',  # 2
        'unlinkat(AT_FDCWD</c>, "f", 0) = 0 <0.000001>',
        'pread64(4</c/f>(deleted), "x"..., 10, 0) = 10 <0.000001>',  # 2 still
        'creat("/c/f", 0600) = 5</c/f> <0.000001>',
        'write(5</c/f>, "x"..., 10) = 10 <0.000001>',  # 3
        opened("t", 6),
        'write(6</c/t>, "x"..., 10) = 10 <0.000001>',  # 4
        'renameat2(AT_FDCWD</c>, "t", AT_FDCWD</c>, "f", 0) = 0 <0.000001>',
        'pread64(6</c/f>, "x"..., 10, 0) = 10 <0.000001>',  # 4
        opened("f", 7, "O_RDONLY"),
        'read(7</c/f>, "x"..., 10) = 10 <0.000001>',  # 4
        'unlink("/c/f") = -1 EACCES (Permission denied) <0.000001>',
        'pread64(7</c/f>, "x"..., 10, 0) = 10 <0.000001>',  # 4
        'truncate("/c/f", 0) = 0 <0.000001>',
        'pread64(7</c/f>, "x"..., 10, 0) = 10 <0.000001>',  # 5
    )
    assert [ids[0] for _, ids in found] == [0, 1, 2, 2, 3, 4, 4, 4, 4, 5]


def test_folders_and_links(tmp_path: Path) -> None:
    found = by_hand(
        tmp_path,
        opened("d/f"),
        'write(3</c/d/f>, "x"..., 10) = 10 <0.000001>',  # 0
        'rename("/c/d", "/c/e") = 0 <0.000001>',
        'openat(AT_FDCWD</c>, "e/f", O_RDONLY) = 4</c/e/f> <0.000001>',
        'read(4</c/e/f>, "x"..., 10) = 10 <0.000001>',  # 0
        'link("/c/e/f", "/c/e/g") = 0 <0.000001>',
        'openat(AT_FDCWD</c>, "e/g", O_RDONLY) = 5</c/e/g> <0.000001>',
        'read(5</c/e/g>, "x"..., 10) = 10 <0.000001>',  # 0
        'openat(AT_FDCWD</c>, "/link/h", O_RDWR|O_CREAT, 0600) = 6</c/e/h> <0.000001>',
        'write(6</c/e/h>, "x"..., 10) = 10 <0.000001>',  # 1
        'unlink("/link/h") = 0 <0.000001>',
        'openat(AT_FDCWD</c>, "/link/h", O_RDWR|O_CREAT, 0600) = 7</c/e/h> <0.000001>',
        'write(7</c/e/h>, "x"..., 10) = 10 <0.000001>',  # 2
        'renameat2(AT_FDCWD</c>, "e/f", AT_FDCWD</c>, "e/h", RENAME_EXCHANGE) = 0 <0.000001>',
        'openat(AT_FDCWD</c>, "e/h", O_RDONLY) = 8</c/e/h> <0.000001>',
        'read(8</c/e/h>, "x"..., 10) = 10 <0.000001>',  # 0
    )
    assert [ids[0] for _, ids in found] == [0, 0, 0, 1, 2, 0]


def test_positions(tmp_path: Path) -> None:
    found = by_hand(
        tmp_path,
        opened("f"),
        'write(3</c/f>, "x"..., 4096) = 4096 <0.000001>',  # extent 0
        'writev(3</c/f>, [{iov_base="a, 5", iov_len=4096}], 1) = 4096 <0.000001>',  # 1
        'pwritev2(3</c/f>, [{iov_base="", iov_len=1}], 1, -1, 0) = 1 <0.000001>',  # 2, at the position
        'preadv2(3</c/f>, [{iov_base="", iov_len=1}], 1, 0, RWF_HIPRI) = 1 <0.000001>',  # 0
        "lseek(3</c/f>, -4096, SEEK_END) = 4097 <0.000001>",
        'read(3</c/f>, "x", 100) = 100 <0.000001>',  # 1
        'read(3</c/f>, "", 100) = 0 <0.000001>',
        "read(3</c/f>, 0x7ff, 100) = -1 EAGAIN (Resource temporarily unavailable) <0.000001>",
        "read(3</c/f>, 0x7ff, 100) = ? ERESTARTSYS (To be restarted) <0.000001>",
        "fcntl(3</c/f>, F_DUPFD_CLOEXEC, 9) = 9</c/f> <0.000001>",
        "lseek(9</c/f>, 0, SEEK_SET) = 0 <0.000001>",
        "close(9</c/f>) = 0 <0.000001>",
        'read(3</c/f>, "x", 4096) = 4096 <0.000001>',  # 0
        'read(3</c/f>, "x", 4097) = 4097 <0.000001>',  # 1, 2
    )
    assert [ids for _, ids in found] == [[0], [1], [2], [0], [1], [0], [1, 2]]


def test_append_begins_at_the_end_that_fstat_told(tmp_path: Path) -> None:
    found = by_hand(
        tmp_path,
        opened("f", 3, "O_WRONLY|O_APPEND"),
        'newfstatat(3</c/f>, "", {st_mode=S_IFREG|0600, st_size=8192, ...}, AT_EMPTY_PATH) = 0 <0.000001>',
        'write(3</c/f>, "x", 1) = 1 <0.000001>',
        'pread64(3</c/f>, "x", 1, 8192) = 1 <0.000001>',
        'pread64(3</c/f>, "x", 1, 0) = 1 <0.000001>',
    )
    assert [ids for _, ids in found] == [[0], [0], [1]]


def test_child_that_runs_before_clone_returns(tmp_path: Path) -> None:
    found = by_hand(
        tmp_path,
        "7 1700000000.000001 " + opened("f"),
        '7 1700000000.000002 write(3</c/f>, "x"..., 4096) = 4096 <0.000001>',
        "7 1700000000.000003 clone(child_stack=NULL, flags=CLONE_CHILD_SETTID|SIGCHLD <unfinished ...>",
        "8 1700000000.000004 close(3</c/f>) = 0 <0.000001>",
        "8 1700000000.000005 " + opened("g"),
        '8 1700000000.000006 write(3</c/g>, "x"..., 1) = 1 <0.000001>',
        "7 1700000000.000007 <... clone resumed>, child_tidptr=0x7f) = 8 <0.000001>",
        '7 1700000000.000008 write(3</c/f>, "x"..., 1) = 1 <0.000001>',
        "8 1700000000.000009 +++ exited with 0 +++",
        "7 1700000000.000010 --- SIGCHLD {si_signo=SIGCHLD} ---",
    )
    assert [ids for _, ids in found] == [[0], [1], [2]]


def test_files_open_before_the_log(tmp_path: Path) -> None:
    found = by_hand(
        tmp_path,
        "strace: Process 7 attached",
        '1700000000.000001 read(5</c/f>, "x"..., 4096) = 4096 <0.000001>',
        '1700000000.000002 read(5</c/f>, "x"..., 4096) = 4096 <0.000001>',
        '1700000000.000003 read(0</dev/pts/0<char 136:0>>, "x"..., 10) = 10 <0.000001>',
        '1700000000.000004 read(4<socket:[123]>, "x"..., 10) = 10 <0.000001>',
        '1700000000.000005 write(4<TCP:[127.0.0.1:1->127.0.0.1:2]>, "x"..., 10) = 10 <0.000001>',
        '1700000000.000006 write(1<pipe:[9]>, "x"..., 10) = 10 <0.000001>',
        '1700000000.000007 read(6</c/\\303\\251\\n>, "x"..., 10) = 10 <0.000001>',
        "strace: Process 7 detached",
    )
    assert [ids for _, ids in found] == [[0], [1], [2]]


def test_without_paths_of_descriptors(tmp_path: Path) -> None:
    found = by_hand(
        tmp_path,
        'openat(AT_FDCWD, "/c/f", O_RDONLY) = 3 <0.000001>',
        'read(3, "x"..., 4096) = 4096',
        'read(3, "x"..., 4096) = 4096',
        'read(8, "x"..., 4096) = 4096',
    )
    assert [ids for _, ids in found] == [[0], [1]]


@pytest.mark.parametrize(
    "line",
    [
        "hello",
        '7 12:00:00.000001 read(3</c/f>, "x", 1) = 1',
        '7 1700000000.000001 read(3</c/f>, "x", 1',
        "7 1700000000.000001 what is this",
        '7 1700000000.000001 read("x") = 1',
        '7 1700000000.000001 pread64(3</c/f>, "x", 1, here) = 1',
        "7 1700000000.000001 openat(AT_FDCWD, 0x7f, O_RDONLY) = 3",
        '7 1700000000.000001 rename("a") = 0',
        "7 1700000000.000001 sendfile(3) = 1",
    ],
)
def test_broken_lines(tmp_path: Path, line: str) -> None:
    path = tmp_path / "hand.log"
    path.write_text(f'7 1700000000.0 read(3</c/f>, "x", 1) = 1\n\n{line}\n')
    with pytest.raises(TraceFormatError, match=r"hand\.log, line 3: .*--skip-bad"):
        strace.read(path)
    trace = strace.read(path, skip_bad=True)
    assert (trace.head.skipped, trace.head.requests) == (1, 1)


def test_options_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="extent_bytes is 0"):
        strace.read(LOG, extent_bytes=0)


def test_empty(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"")
    with pytest.raises(TraceFormatError, match="log: no requests"):
        strace.read(tmp_path / "log")


def test_recognise() -> None:
    assert strace.recognise(LOG, LOG.read_bytes())
    assert strace.recognise(
        LOG, b"strace: Process 7 attached\n[pid     7] 1700000000.000001 <... read resumed>"
    )
    for other in (b"", b"1,2,3\n", b'{"timestamp": 1}\n', b"\0" * 99, b"12:00:00 read(3) = 1\n"):
        assert not strace.recognise(LOG, other)
