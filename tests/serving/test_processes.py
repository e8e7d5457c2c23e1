"""Servers and clients as processes that die, hang and come back: nobody waits long, no byte is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serve_kit import (
    MAIN,
    SharedRows,
    client,
    comes_back,
    hears,
    load_rows,
    python,
    save_rows,
    server_process,
    write_toml,
)

from faulty_io import FaultyIO
from kvstrata.config import ServeConfig
from kvstrata.serving import StoreServer
from kvstrata.types import Outcome
from store_kit import (
    WAIT_SECONDS,
    chain,
    check_quiet,
    eventually,
    load,
    make_config,
    nvme_tier,
    save,
)

IMPORTS = "from serve_kit import *\nfrom store_kit import *\n"


def test_a_server_that_is_killed_makes_its_clients_miss_and_they_come_back_to_what_is_on_nvme(
    tmp_path: Path,
) -> None:
    toml, keys, rows = write_toml(tmp_path), chain(1, 40), SharedRows(40)
    with (
        server_process(toml) as server,
        client(server.socket, memory=[rows.map]) as one,
        client(server.socket) as two,
    ):
        assert set(save_rows(one, rows, keys)) == {Outcome.SAVED}
        assert one.flush(WAIT_SECONDS)
        in_flight = one.save(chain(2, 40), rows.rows(range(40)))
        server.kill()
        # Whatever it was at, nobody touches this memory any more: it is known at once.
        assert in_flight.wait(WAIT_SECONDS) and in_flight.wait_released(WAIT_SECONDS)
        assert set(in_flight.outcomes) <= {Outcome.SAVED, Outcome.UNAVAILABLE}
        assert one.lookup(keys).blocks == 0 == two.lookup(keys).blocks
        assert load(two, keys) == [Outcome.UNAVAILABLE] * 40
        assert save(two, chain(3, 2)) == [Outcome.UNAVAILABLE] * 2
        with server_process(toml):
            for store in (one, two):
                comes_back(store)
                assert store.lookup(keys).blocks == 40
            assert load_rows(one, rows, keys) == [Outcome.LOADED] * 40
            assert load(two, keys) == [Outcome.LOADED] * 40
            assert one.telemetry.value("serve_lost_total", "closed") == 1
            assert one.telemetry.value("serve_connects_total", "good") == 2
            assert one.telemetry.value("serve_staged_bytes_total") == 0


def test_a_client_killed_in_the_middle_of_a_load_frees_its_pins_and_its_memory(tmp_path: Path) -> None:
    """The disk hangs, so that it is the middle; others go on meanwhile."""
    io, keys = FaultyIO(), chain(1, 6)
    tier = nvme_tier(tmp_path / "nvme", prepare="no")
    config = replace(
        make_config(tier, io_deadline_seconds=60.0), serve=ServeConfig(socket=str(tmp_path / "socket"))
    )
    script = """
rows, keys = SharedRows(8), chain(1, 6)
store = client(Path(sys.argv[1]), memory=[rows.map])
transfers = [store.load(store.lookup(keys), rows.rows(range(6))) for _ in range(2)]
print("loading", flush=True)
sys.stdin.read()
"""
    with StoreServer(config, file_io=io) as server, client(server.path) as other:
        assert set(save(other, keys)) == {Outcome.SAVED}
        io.hang("read")
        with python(IMPORTS + script, server.path) as victim:
            hears(victim, "loading")
            io.wait_hanging("read")

            def both_run() -> bool:
                (there,) = [row for row in server.state()["clients"] if row["pid"] == victim.pid]
                return there["held_bytes"] == 12 * 8192 and there["regions"] == 1

            eventually(both_run, "the victim's loads are not there")
            assert server.state()["tiers"][0]["pinned_blocks"] == 6
            victim.kill()
        assert other.lookup(keys).blocks == 6, "others go on"
        regions = {row["pid"]: row["regions"] for row in server.state()["clients"]}
        assert regions.get(victim.pid) == 1, "its memory stays mapped while the engine writes to it"
        io.release()
        eventually(lambda: len(server.state()["clients"]) == 1, "the victim is left over")
        assert server.store is not None
        check_quiet(server.store)
        assert "memfd:rows" not in Path("/proc/self/maps").read_text(), "its memory is still mapped"
        assert load(other, keys) == [Outcome.LOADED] * 6


def test_a_server_that_hangs_costs_one_deadline_and_holds_the_buffers_until_it_goes_on(
    tmp_path: Path,
) -> None:
    toml, keys = write_toml(tmp_path, deadline=0.5), chain(1, 8)
    rows = SharedRows(8)
    with (
        server_process(toml) as server,
        client(server.socket, memory=[rows.map], call_seconds=0.5) as store,
    ):
        assert set(save_rows(store, rows, keys)) == {Outcome.SAVED} and store.flush(WAIT_SECONDS)
        match = store.lookup(keys)
        server.hang()
        saving = store.save(chain(2, 8), rows.rows(range(8)))
        loading = store.load(match, rows.rows(range(8)))
        assert store.lookup(keys).blocks == 0, "a miss after a deadline"
        assert not store.connected
        assert store.lookup(keys).blocks == 0 and load(store, keys) == [Outcome.UNAVAILABLE] * 8
        for transfer in (saving, loading):
            assert transfer.wait(WAIT_SECONDS) and set(transfer.outcomes) == {Outcome.LATE}
            assert not transfer.released, "it may still write there when it goes on"
            assert not transfer.wait_released(0.1)
        server.send(signal.SIGCONT)
        for transfer in (saving, loading):
            assert transfer.wait_released(WAIT_SECONDS)
        comes_back(store)
        assert load_rows(store, rows, keys) == [Outcome.LOADED] * 8
        assert store.telemetry.value("serve_lost_total", "late") == 1


def test_a_hung_server_that_is_killed_releases_the_buffers(tmp_path: Path) -> None:
    keys, rows = chain(1, 4), SharedRows(4)
    with (
        server_process(write_toml(tmp_path)) as server,
        client(server.socket, memory=[rows.map], call_seconds=0.2) as store,
    ):
        assert store.lookup(keys).blocks == 0
        server.hang()
        saving = store.save(keys, rows.rows(range(4)))
        assert store.lookup(keys).blocks == 0
        assert not saving.done and not saving.released
        server.kill()
        assert saving.wait(WAIT_SECONDS) and saving.outcomes == [Outcome.UNAVAILABLE] * 4
        assert saving.released


EIGHT = """
import random
from collections import Counter

def work(number):
    rows, chance, counts = SharedRows(24), random.Random(number), Counter()
    store = client(Path(sys.argv[1]), memory=[rows.map])
    mine = rows if number % 2 else None  # every other one goes through its arena
    for turn in range(25):
        keys = chain(chance.randrange(12), chance.randint(1, 24))
        if chance.random() < 0.5:
            outcomes = save_rows(store, mine, keys) if mine else save(store, keys)
            assert set(outcomes) <= {Outcome.SAVED, Outcome.PRESENT, Outcome.REJECTED}, outcomes
        else:
            outcomes = load_rows(store, mine, keys) if mine else load(store, keys)
            assert set(outcomes) <= {Outcome.LOADED, Outcome.ABSENT}, outcomes
        counts.update(outcomes)
        store.touch(keys, request=store.new_request())
    assert store.telemetry.value("serve_lost_total") == 0
    assert (store.telemetry.value("serve_staged_bytes_total") == 0) == bool(mine)
    store.close()
    assert counts[Outcome.LOADED], "nothing was ever there"

def run(number):
    try:
        work(number)
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        os._exit(1)

children = [os.fork() or run(number) for number in range(8)]
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
print("good", flush=True)
"""


def test_eight_clients_at_once_get_every_byte_right(tmp_path: Path) -> None:
    """Two tiers of less than the blocks that they use, so that blocks leave and come all the while."""
    toml = write_toml(tmp_path, memory="512KiB", nvme="2MiB")
    with server_process(toml) as server:
        with python(IMPORTS + EIGHT, server.socket) as clients:
            hears(clients, "good")
        state = status(toml)
        assert [row["role"] for row in state["clients"]] == ["observer"]
        assert [tier["pinned_blocks"] for tier in state["tiers"]] == [0, 0]
        server.stop()


def status(toml: Path) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-c", MAIN, "serve", str(toml), "--status", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return dict(json.loads(run.stdout))


def test_sigterm_closes_the_tiers_cleanly_and_the_command_shows_who_is_there(tmp_path: Path) -> None:
    toml, keys = write_toml(tmp_path), chain(1, 9)
    with server_process(toml) as server, client(server.socket) as store:
        assert set(save(store, keys)) == {Outcome.SAVED}
        engines = [row["pid"] for row in status(toml)["clients"] if row["role"] == "engine"]
        assert engines == [os.getpid()]
        table = subprocess.run(
            [sys.executable, "-c", MAIN, "serve", str(toml), "--status"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert "blocks of 8.0 KiB" in table and str(os.getpid()) in table and "memory" in table
        second = subprocess.run(
            [sys.executable, "-c", MAIN, "serve", str(toml)], capture_output=True, text=True, check=False
        )
        assert second.returncode == 2 and f"process {server.process.pid}" in second.stderr
        assert server.stop() == "", "quiet by default"
        assert not server.socket.exists()
        again = subprocess.run(
            [sys.executable, "-c", MAIN, "serve", str(toml), "--status"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert again.returncode == 2 and "is `kvstrata serve` running?" in again.stderr
        with server_process(toml):
            comes_back(store)
            report = store.status()[1].open_report
            assert report is not None and report.from_index and report.restored == 9


def test_a_server_killed_while_clients_save_serves_nothing_wrong_afterwards(tmp_path: Path) -> None:
    toml = write_toml(tmp_path)
    script = """
rows, number = SharedRows(16), 0
store = client(Path(sys.argv[1]), memory=[rows.map], call_seconds=1.0)
print("saving", flush=True)
while True:
    number += 1
    save_rows(store, rows, chain(number % 20, 16))
    load_rows(store, rows, chain((7 * number) % 20, 16))
"""
    with (
        server_process(toml) as first,
        python(IMPORTS + script, first.socket) as one,
        python(IMPORTS + script, first.socket) as two,
    ):
        for process in (one, two):
            hears(process, "saving")
        time.sleep(0.5)
        first.kill()
        with server_process(toml) as second, client(second.socket) as judge:
            for number in range(20):
                load(judge, chain(number, 16))  # fails the test for a wrong byte
            second.kill()
        assert one.poll() is None and two.poll() is None, "a client met a wrong byte, or an error"


@pytest.mark.parametrize("memory", ["registered", "arena"])
def test_a_client_killed_while_it_saves_leaves_no_wrong_block(memory: str, tmp_path: Path) -> None:
    toml = write_toml(tmp_path)
    script = """
rows, number = SharedRows(16), 0
store = client(Path(sys.argv[1]), memory=[rows.map] if sys.argv[2] == "registered" else ())
print("saving", flush=True)
while True:
    number += 1
    save_rows(store, rows, chain(number % 20, 16))
"""
    with server_process(toml) as server, client(server.socket) as judge:
        for _ in range(2):
            with python(IMPORTS + script, server.socket, memory) as victim:
                hears(victim, "saving")
                time.sleep(0.3)
                victim.kill()
            for number in range(20):
                load(judge, chain(number, 16))
        eventually(lambda: len(status(toml)["clients"]) == 2, "a session is left over")
        assert [tier.pinned_blocks for tier in judge.status()] == [0, 0]
