"""A server and its clients: what they share, what they may hold, whom the server turns away."""

from __future__ import annotations

import array
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_kit import MAIN, SharedRows, client, comes_back, hears, load_rows, python, save_rows

from faulty_io import FaultyIO
from kvstrata.cli.serve import _ask
from kvstrata.config import MetricsConfig, ServeConfig
from kvstrata.errors import ConfigError, LayoutMismatchError, StoreClosedError
from kvstrata.hashing import namespace_digest
from kvstrata.serving import StoreServer
from kvstrata.serving import protocol as p
from kvstrata.types import BlockLayout, Lookup, Namespace, Outcome
from store_kit import (
    LAYOUT,
    NAMESPACE,
    WAIT_SECONDS,
    chain,
    check_bytes,
    check_quiet,
    contents,
    descriptors,
    eventually,
    finished,
    load,
    make_config,
    memory_tier,
    nvme_tier,
    save,
)


@contextmanager
def serving(
    folder: Path, *tiers: Any, file_io: Any = None, metrics: int = 0, store: Any = None, **serve: Any
) -> Iterator[StoreServer]:
    config = make_config(*(tiers or (memory_tier(256),)), **(store or {}))
    config = replace(
        config,
        serve=ServeConfig(socket=str(folder / "socket"), **serve),
        metrics=MetricsConfig(port=metrics),
    )
    with StoreServer(config, file_io=file_io) as server:
        yield server
        if server.store is not None and file_io is None:
            check_quiet(server.store)


def quiet(server: StoreServer) -> None:
    """Every client that left is cleared up."""
    eventually(lambda: not server.state()["clients"], "a session is left over")


def test_two_clients_share_what_either_saved(tmp_path: Path) -> None:
    mine, theirs = chain(1, 12), chain(2, 7)
    rows = SharedRows(16)
    with (
        serving(tmp_path) as server,
        client(server.path, memory=[rows.map]) as one,
        client(server.path) as two,
    ):
        assert save_rows(one, rows, mine) == [Outcome.SAVED] * 12
        assert one.telemetry.value("serve_staged_bytes_total") == 0, "registered rows are not copied"
        assert save(two, theirs) == [Outcome.SAVED] * 7
        assert two.telemetry.value("serve_staged_bytes_total", "save") == 7 * LAYOUT.block_bytes
        assert two.lookup(mine).blocks == 12
        assert load(two, mine) == [Outcome.LOADED] * 12
        assert load_rows(one, rows, theirs) == [Outcome.LOADED] * 7
        assert save(two, mine) == [Outcome.PRESENT] * 12
        assert [tier.blocks for tier in one.status()] == [19]
    rows.close()  # nothing of a closed store holds the engine's memory
    assert server.telemetry.value("serve_clients_total", "left") == 2


def test_a_remote_store_answers_as_a_store_does(tmp_path: Path) -> None:
    keys = chain(1, 6)
    with serving(tmp_path, memory_tier(64), nvme_tier(tmp_path / "nvme")) as server:
        store = client(server.path)
        assert save(store, keys[:4]) == [Outcome.SAVED] * 4
        match = store.lookup(keys)
        assert (match.keys, match.blocks) == (tuple(keys), 4)
        assert match.states == (Lookup.HIT,) * 4 + (Lookup.MISS,) * 2
        holes = store.save(keys, [None, *contents(keys[1:2]), None, None, *contents(keys[4:5]), None])
        assert finished(holes) == [Outcome.PRESENT] * 4 + [Outcome.SAVED, Outcome.ABSENT]
        assert load(store, keys)[4:] == [Outcome.LOADED, Outcome.ABSENT]
        short = chain(3, 2)
        assert finished(store.save(short, contents(short, 100))) == [Outcome.SAVED] * 2
        assert load(store, short, 100) == [Outcome.LOADED] * 2
        assert store.lookup([]).blocks == 0 and finished(store.load(store.lookup([]), [])) == []
        request = store.new_request()
        assert store.new_request() != request
        store.touch(keys, request=request)
        store.end_request(request, input_tokens=6, output_tokens=1)
        assert store.flush(WAIT_SECONDS)
        assert store.discard(keys[:2]) == 4, "two blocks in two tiers"
        assert store.lookup(keys).blocks == 0
        assert [tier.name for tier in store.status()] == ["memory", "nvme"]
        for wrong in ([bytes(4096)], [bytes(LAYOUT.block_bytes + 1)] * 6, [np.zeros((4, 4))[:, 1]] * 6):
            with pytest.raises(LayoutMismatchError):
                store.save(keys, wrong)  # type: ignore[arg-type]
        with pytest.raises(LayoutMismatchError, match="writable"):
            store.load(store.lookup(keys), [bytes(8192)] * 6)
        with pytest.raises(LayoutMismatchError, match="7 targets for 6 keys"):
            store.load(store.lookup(keys), [bytearray(8192)] * 7)
        many = chain(9, 17_000)
        with pytest.raises(LayoutMismatchError, match="16384"):
            store.save(many, [None] * len(many))
        assert store.lookup(many * 5).blocks == 0, "more keys than a frame has"
        store.close()
        store.close()
        for call in (store.lookup, store.touch, store.discard):
            with pytest.raises(StoreClosedError):
                call(keys)
        quiet(server)


def test_what_was_saved_is_there_after_a_clean_stop(tmp_path: Path) -> None:
    keys = chain(1, 20)
    for expected in (0, 20):
        with serving(tmp_path, nvme_tier(tmp_path / "nvme")) as server, client(server.path) as store:
            assert store.lookup(keys).blocks == expected
            assert set(save(store, keys)) == {Outcome.PRESENT if expected else Outcome.SAVED}
            report = store.status()[0].open_report
            assert report is not None and report.from_index == bool(expected)
    assert not server.path.exists()


def test_namespaces_share_the_tiers_and_keys_keep_them_apart(tmp_path: Path) -> None:
    other = Namespace(namespace_digest({"model": "other"}), {"model": "other"})
    with serving(tmp_path) as server:
        with client(server.path) as one, client(server.path, namespace=other) as two:
            mine, theirs = chain(1, 5), chain(1, 5, other)
            assert set(save(one, mine)) == {Outcome.SAVED}
            assert two.lookup(theirs).blocks == 0
            assert set(save(two, theirs)) == {Outcome.SAVED}
            assert load(one, mine) == [Outcome.LOADED] * 5 == load(two, theirs)
            assert [row["fields"] for row in server.state()["namespaces"]] == [
                NAMESPACE.fields,
                other.fields,
            ]
        quiet(server)


# Whom it turns away


def refused(server: StoreServer, match: str, **fields: Any) -> None:
    with pytest.raises(ConfigError, match=match):
        client(server.path, **fields)


def test_another_block_size_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with serving(tmp_path) as server, client(server.path) as store:
        refused(server, "blocks of 8192 bytes.*another `kvstrata serve`", layout=BlockLayout(4096, 1))
        eventually(lambda: len(server.state()["clients"]) == 1, "the refused one is left over")
        assert store.connected and server.telemetry.value("serve_clients_total", "refused") == 1


def test_one_client_too_many_is_refused_and_an_operator_is_not(tmp_path: Path) -> None:
    with serving(tmp_path, max_clients=2) as server, client(server.path), client(server.path) as second:
        refused(server, "serve.max_clients")
        assert cli_status(server)["max_clients"] == 2
        second.close()
        eventually(lambda: len(server.state()["clients"]) == 1, "the second is left over")
        client(server.path).close()


def cli_status(server: StoreServer) -> dict[str, Any]:
    return _ask(server.path, ServeConfig())


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("open_to_all", [False, True])
def test_other_users_are_served_only_if_that_is_configured(open_to_all: bool) -> None:
    hello = p.pack(
        p.Kind.HELLO,
        p.VERSION,
        p.pack_json({"role": "observer"}),
    )
    script = f"""
import os, socket
os.setgid(65534); os.setuid(65534)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
try:
    sock.connect(sys.argv[1])
except PermissionError:
    print("no permission"); sys.exit()
sock.sendall({hello!r})
print(sock.recv(1 << 16)[4])
"""
    with (
        tempfile.TemporaryDirectory() as folder,  # not pytest's, where strangers see nothing at all
        serving(Path(folder), other_users=open_to_all) as server,
    ):
        Path(folder).chmod(0o755)
        mode = server.path.stat().st_mode & 0o777
        assert mode == (0o666 if open_to_all else 0o600)
        with python("import sys\n" + script, server.path) as stranger:
            hears(stranger, str(int(p.Kind.WELCOME)) if open_to_all else "no permission")
        server.path.chmod(0o666)  # even where the file lets them in
        with python("import sys\n" + script, server.path) as stranger:
            hears(stranger, str(int(p.Kind.WELCOME if open_to_all else p.Kind.REFUSED)))


def test_a_second_server_at_a_socket_is_an_error_that_names_the_first(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        with pytest.raises(ConfigError, match=f"process {os.getpid()} .*choose another path"):
            StoreServer(server.config)
        assert server.path.exists()
        client(server.path).close()


def test_a_socket_that_a_dead_server_left_is_taken_over_and_other_files_are_not(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    with serving(tmp_path) as server:
        client(server.path).close()
    path.write_text("mine")
    with pytest.raises(ConfigError, match="no socket"), serving(tmp_path):
        pass
    assert path.read_text() == "mine"
    with pytest.raises(ConfigError, match="107 bytes"), serving(tmp_path / ("x" * 120)):
        pass


def test_tiers_that_cannot_be_opened_refuse_the_client_and_say_why(tmp_path: Path) -> None:
    with serving(tmp_path, nvme_tier(tmp_path / "nvme", 4096)) as server:
        refused(server, "capacity_bytes .* too small")


# What clients may hold


def test_a_client_gets_its_leading_blocks_at_its_bound_of_bytes(tmp_path: Path) -> None:
    bound = 5 * LAYOUT.block_bytes
    keys = chain(1, 9)
    with serving(tmp_path, client_bytes=bound) as server, client(server.path) as store:
        assert save(store, keys) == [Outcome.SAVED] * 5 + [Outcome.REJECTED] * 4
        assert save(store, keys[5:]) == [Outcome.SAVED] * 4, "the bound is on what is in flight"
        assert load(store, keys) == [Outcome.LOADED] * 5 + [Outcome.REJECTED] * 4
        assert server.telemetry.value("serve_rejected_total", "client_bytes") == 8


def test_a_client_has_so_many_transfers_and_regions(tmp_path: Path) -> None:
    io = FaultyIO()
    tier = nvme_tier(tmp_path / "nvme", prepare="no")
    bounds = {"client_transfers": 2, "client_regions": 2}
    with (
        serving(tmp_path, tier, file_io=io, **bounds) as server,
        client(server.path) as store,
        client(server.path) as other,
    ):
        io.hang("write")
        waiting = [store.save(chain(n, 1), contents(chain(n, 1))) for n in (1, 2)]
        io.wait_hanging("write")
        assert save(store, chain(3, 2)) == [Outcome.REJECTED] * 2
        assert server.telemetry.value("serve_rejected_total", "client_transfers") == 2
        fourth = other.save(chain(4, 1), contents(chain(4, 1)))  # another client has its own bound
        io.release()
        assert [finished(transfer) for transfer in [*waiting, fourth]] == [[Outcome.SAVED]] * 3
        assert save(store, chain(3, 2)) == [Outcome.SAVED] * 2
        rows = [SharedRows(1), SharedRows(1)]
        assert store.register(rows[0].map), "the arena is the first region, this the second"
        assert not store.register(rows[1].map)
        assert not other.register(bytearray(8192)), "private memory cannot be shared"
        assert save_rows(store, rows[1], chain(5, 1)) == [Outcome.SAVED], "it goes through the arena"


def test_blocks_that_find_no_room_in_the_arena_are_turned_away_and_counted(tmp_path: Path) -> None:
    keys = chain(1, 9)
    with serving(tmp_path) as server, client(server.path, arena_bytes=4 * LAYOUT.block_bytes) as store:
        assert save(store, keys) == [Outcome.SAVED] * 4 + [Outcome.REJECTED] * 5
        assert store.telemetry.value("serve_staging_full_total", "save") == 5
        assert save(store, keys[4:8]) == [Outcome.SAVED] * 4, "the slots came back"
        assert load(store, keys[:4]) == [Outcome.LOADED] * 4
        assert load(store, keys) == [Outcome.LOADED] * 4 + [Outcome.REJECTED] * 5


# A deadline, on this side of the socket


def test_a_late_load_is_released_when_the_server_says_so_and_its_target_is_left_alone(
    tmp_path: Path,
) -> None:
    io, keys, rows = FaultyIO(), chain(1, 2), SharedRows(2)
    tier = nvme_tier(tmp_path / "nvme", prepare="no")
    deadline = {"io_deadline_seconds": 0.3}
    with (
        serving(tmp_path, tier, file_io=io, store=deadline) as server,
        client(server.path, memory=[rows.map]) as store,
    ):
        assert save_rows(store, rows, keys) == [Outcome.SAVED] * 2
        io.hang("read")
        match = store.lookup(keys)
        staged = bytearray(b"\xa5" * 8192)
        direct = store.load(match, rows.rows(range(2)))
        through_arena = store.load(store.lookup(keys[:1]), [staged])
        for transfer in (direct, through_arena):
            assert transfer.wait(WAIT_SECONDS)
            assert set(transfer.outcomes) == {Outcome.LATE} and not transfer.released
        assert store.connected, "the server kept its deadline"
        io.release()
        assert direct.wait_released(WAIT_SECONDS) and through_arena.wait_released(WAIT_SECONDS)
        assert staged == b"\xa5" * 8192


# What is no client


def talk(server: StoreServer, data: bytes, fds: tuple[int, ...] = ()) -> bytes:
    """Everything that the server answers until it hangs up, or nothing for a moment."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(server.path))
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sock.sendmsg([data], ancillary)
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(WAIT_SECONDS)
        answer = b""
        while True:
            try:
                piece = sock.recv(1 << 16)
            except ConnectionResetError:
                return answer
            if not piece:
                return answer
            answer += piece


def hello(**fields: Any) -> bytes:
    shape = {"block_bytes": LAYOUT.block_bytes, "block_tokens": 1}
    about = {"namespace": NAMESPACE.digest.hex(), "fields": {}} | shape | fields
    return p.pack(p.Kind.HELLO, p.VERSION, p.pack_json(about))


def test_garbage_closes_its_own_connection_and_no_other(tmp_path: Path) -> None:
    keys = chain(1, 4)
    before = descriptors()
    with serving(tmp_path) as server, client(server.path) as store:
        assert set(save(store, keys)) == {Outcome.SAVED}

        @settings(max_examples=40)
        @given(st.one_of(st.binary(max_size=400), st.binary(max_size=100).map(lambda end: hello() + end)))
        def throw(data: bytes) -> None:
            pipe = os.pipe()
            talk(server, data, (pipe[1],))
            for fd in pipe:
                os.close(fd)
            assert store.lookup(keys).blocks == 4

        throw()
        eventually(lambda: len(server.state()["clients"]) == 1, "a session is left over")
        assert load(store, keys) == [Outcome.LOADED] * 4
    assert descriptors() == before


WRONG_FRAMES = {
    "a frame above the limit": b"\xff\xff\xff\x7f" + p.pack(p.Kind.LOOKUP)[4:],
    "half a key": p.pack(p.Kind.LOOKUP, 5, bytes(33)),
    "a hello again": p.pack(p.Kind.HELLO, 1, b"{}"),
    "an answer from a client": p.pack(p.Kind.DONE, 5),
    "a region without a descriptor": p.pack(p.Kind.REGION, 5, p.pack_region(1, 0, 4096)),
    "a block in no region": p.pack(
        p.Kind.SAVE, 5,
        p.pack_move(p.Move(0, chain(1, 1), *np.ones((2, 1), np.int64), np.ones(1, np.int32))),
    ),
    "a save of too many blocks": p.pack(
        p.Kind.SAVE, 5,
        p.pack_move(
            p.Move(0, chain(1, 17_000), *np.zeros((2, 17_000), np.int64), np.full(17_000, -1, np.int32))
        ),
    ),
    "a request of another client": p.pack(p.Kind.TOUCH, 0, p.pack_touch(1 << 41, [])),
    "a wait of nan": p.pack(p.Kind.FLUSH, 5, p.pack_seconds(float("nan"))),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_FRAMES)
def test_what_no_client_sends_is_not_answered_and_counted(what: str, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        pipe = os.pipe()
        answer = talk(server, hello() + WRONG_FRAMES[what] + p.pack(p.Kind.STATUS, 9), (pipe[1],))
        for fd in pipe:
            os.close(fd)
        kinds = [frame.kind for frame in p.FrameDecoder().feed(answer)]
        assert kinds == [p.Kind.WELCOME]
        quiet(server)
        assert server.telemetry.value("serve_clients_total", "broken") == 1
        client(server.path).close()


def test_a_block_outside_its_region_is_never_touched(tmp_path: Path) -> None:
    fd = os.memfd_create("region")
    os.ftruncate(fd, 8192)
    with serving(tmp_path) as server:
        for offset, length in ((8191, 2), (-1, 2), (2**63 - 1, 8192), (0, 8193), (0, 0), (0, -1)):
            pipe = os.pipe()
            move = p.Move(
                0, chain(1, 1), np.array([offset]), np.array([length]), np.ones(1, np.int32)
            )  # fmt: skip
            region = p.pack(p.Kind.REGION, 5, p.pack_region(1, 0, 8192))
            frames = hello() + region + p.pack(p.Kind.SAVE, 6, p.pack_move(move))
            answer = talk(server, frames, (pipe[1], fd))
            kinds = [frame.kind for frame in p.FrameDecoder().feed(answer)]
            assert kinds == [p.Kind.WELCOME, p.Kind.COUNT], (offset, length)
            for end in pipe:
                os.close(end)
        quiet(server)
        assert server.telemetry.value("serve_clients_total", "broken") == 6
    os.close(fd)


def test_another_version_is_refused_by_name(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        old = p.pack(p.Kind.HELLO, p.VERSION + 1, p.pack_json({}))
        (frame,) = p.FrameDecoder().feed(talk(server, old))
        assert frame.kind is p.Kind.REFUSED and b"install the same kvstrata" in frame.payload


def test_a_client_that_says_nothing_is_hung_up_on(tmp_path: Path) -> None:
    with serving(tmp_path, call_seconds=0.05) as server, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(server.path))
        sock.settimeout(WAIT_SECONDS)
        assert sock.recv(1) == b""
        quiet(server)


# Coming and going


def test_a_client_finds_a_server_that_comes_later_and_one_that_comes_again(tmp_path: Path) -> None:
    keys, rows = chain(1, 8), SharedRows(8)
    store = client(tmp_path / "socket", memory=[rows.map])
    assert not store.connected and store.lookup(keys).blocks == 0
    assert save(store, keys) == [Outcome.UNAVAILABLE] * 8 == load(store, keys)
    assert store.status() == [] and not store.flush(1.0) and store.discard(keys) == 0
    store.touch(keys)
    for again in range(2):
        with serving(tmp_path, nvme_tier(tmp_path / "nvme")) as server:
            comes_back(store)
            assert set(save_rows(store, rows, keys)) == {Outcome.PRESENT if again else Outcome.SAVED}
            assert load_rows(store, rows, keys) == [Outcome.LOADED] * 8
            assert store.telemetry.value("serve_staged_bytes_total") == 0, "registered again"
            assert server.state()["clients"][0]["regions"] == 1
        assert store.lookup(keys).blocks == 0
    assert store.telemetry.value("serve_connects_total", "good") == 2
    eventually(lambda: store.telemetry.value("serve_lost_total", "closed") == 2, "a loss was not counted")
    store.close()
    rows.close()


def test_a_forked_child_has_a_connection_of_its_own(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from serve_kit import *
from store_kit import *
store = client(Path(sys.argv[1]))
keys = chain(1, 4)
assert set(save(store, keys)) == {Outcome.SAVED}
child = os.fork()
if child == 0:
    comes_back(store)
    assert load(store, keys) == [Outcome.LOADED] * 4
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert store.connected and load(store, keys) == [Outcome.LOADED] * 4
assert store.telemetry.value("serve_lost_total") == 0
print("good", flush=True)
"""
    with serving(tmp_path) as server, python(script, server.path) as process:
        hears(process, "good")
        assert process.wait(WAIT_SECONDS) == 0
        quiet(server)


def test_the_metrics_show_the_server_and_its_clients(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with serving(tmp_path, metrics=port) as server, client(server.path) as store:
        save(store, chain(1, 3))
        page = urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30).read().decode()
        assert "kvstrata_serve_clients 1.0" in page
        assert 'kvstrata_serve_bound{name="client_bytes"}' in page
        assert 'kvstrata_tier_blocks{tier="memory"} 3.0' in page


def test_many_threads_of_one_client_each_get_their_own_answers(tmp_path: Path) -> None:
    wrong: list[str] = []
    with serving(tmp_path, memory_tier(2048)) as server, client(server.path) as store:

        def work(number: int) -> None:
            for turn in range(30):
                keys = chain(100 * number + turn, 1 + (number + turn) % 9)
                if set(save(store, keys)) != {Outcome.SAVED} or store.lookup(keys).blocks != len(keys):
                    wrong.append(f"{number} {turn}")
                targets = [bytearray(8192) for _ in keys]
                transfer = store.load(store.lookup(keys), targets)
                outcomes = finished(transfer)
                check_bytes(keys, targets, outcomes)
                if set(outcomes) != {Outcome.LOADED}:
                    wrong.append(f"{number} {turn} {outcomes}")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_SECONDS)
        assert not wrong and not any(thread.is_alive() for thread in threads)


def test_an_open_remote_store_needs_no_tiers_and_its_process_may_just_end(tmp_path: Path) -> None:
    script = """
from serve_kit import *
from store_kit import *
store = client(Path(sys.argv[1]))
store.save(chain(1, 4), contents(chain(1, 4)))
"""
    with serving(tmp_path) as server:
        with python(script, server.path) as process:
            assert process.wait(WAIT_SECONDS) == 0
        quiet(server)
        with client(server.path) as store:
            assert store.lookup(chain(1, 4)).blocks == 4, "a save that was handed over is finished"


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    toml = tmp_path / "kvstrata.toml"
    toml.write_text('[[tier]]\ntype = "memory"\n')
    for arguments, word in (([], "serve.socket"), (["--status"], "serve.socket")):
        run = subprocess.run(
            [sys.executable, "-c", MAIN, "serve", str(toml), *arguments],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 2 and word in run.stderr and run.stderr.count("\n") == 1
