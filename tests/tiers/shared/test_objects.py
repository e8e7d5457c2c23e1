"""The small things of a shared folder as objects: in a local folder, in memory, on a real S3 server."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.radosgw import RadosGateway, S3Account
from kvstrata.config import ObjectStoreTierConfig
from kvstrata.errors import ConfigError
from object_kit import local_config, s3_config
from store_kit import eventually

pytest.importorskip("obstore", reason="obstore is not installed; run: pip install 'kvstrata[object-store]'")

from obstore.store import MemoryStore

from kvstrata.tiers.shared.object_client import ObjectClient, open_client, shown_url
from kvstrata.tiers.shared.objects import TAIL_BYTES, ObjectMedium

Make = Callable[[], ObjectMedium]


@pytest.fixture(params=["memory", "local", "s3"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Makes one more member's view of one empty store."""
    if request.param == "memory":
        store = MemoryStore()
        return lambda: ObjectMedium(ObjectClient(store))
    if request.param == "local":
        return lambda: ObjectMedium(open_client(local_config(tmp_path / "bucket")))
    account: S3Account = request.getfixturevalue("s3_account")
    return lambda: ObjectMedium(open_client(s3_config(account)))


@pytest.fixture
def medium(make: Make) -> ObjectMedium:
    return make()


JOURNAL = "members/00000000000000aa/journal-3"
BEAT = "members/00000000000000aa/beat"


def test_nothing_is_there(medium: ObjectMedium) -> None:
    medium.prepare()
    assert medium.fetch("kvstrata-shared.json") is None
    assert medium.fetch(JOURNAL) is None and medium.fetch(JOURNAL, 5) is None
    assert medium.read_extent("extents/none", 0, 10) is None
    assert medium.read_extent("extents/none", -10, 10) is None
    assert medium.names("extents") == {} and medium.folders("members") == []
    assert medium.tails({}, "members") == {}
    medium.remove("collector/epoch-1")
    medium.remove("extents/none")
    medium.remove("writing/none")
    medium.remove_folder("members/00000000000000aa")


def test_only_one_member_creates_a_file(make: Make) -> None:
    mediums = [make() for _ in range(6)]
    for epoch in range(3):
        made = [False] * 6
        start = threading.Barrier(6)

        def one(number: int, name: str, made: list[bool] = made, start: Any = start) -> None:
            start.wait()
            made[number] = mediums[number].create(name, b"%d" % number)

        threads = [
            threading.Thread(target=one, args=(number, f"collector/epoch-{epoch}")) for number in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert made.count(True) == 1
        assert mediums[0].fetch(f"collector/epoch-{epoch}") == b"%d" % made.index(True)
    assert mediums[0].names("collector") == {f"collector/epoch-{epoch}": 1 for epoch in range(3)}


def test_a_file_is_replaced(make: Make) -> None:
    medium, other = make(), make()
    assert medium.create(BEAT, b"1")
    for number in range(4):
        medium.replace(BEAT, b"%d" % number * 10)
        assert other.fetch(BEAT) == b"%d" % number * 10
    assert other.fetch(BEAT, 6) == b"3" * 4
    medium.replace("collector/grants-1", b"{}")
    assert other.fetch("collector/grants-1") == b"{}"


def test_a_removed_member_does_not_come_back(make: Make) -> None:
    medium, other = make(), make()
    assert medium.create(BEAT, b"1")
    medium.append(JOURNAL, 0, bytes(TAIL_BYTES))
    medium.append(JOURNAL, TAIL_BYTES, b"more")
    other.remove_folder("members/00000000000000aa")
    with pytest.raises(FileNotFoundError):
        medium.replace(BEAT, b"2")
    with pytest.raises(FileNotFoundError):
        medium.append(JOURNAL, TAIL_BYTES + 4, b"and more")
    assert other.folders("members") == [] and other.fetch(JOURNAL) is None


def test_a_journal_in_few_objects(make: Make) -> None:
    medium, other = make(), make()
    whole, known = b"", 0
    for number in range(300):
        data = bytes([number % 251]) * (1 + number * 7 % 900)
        medium.append(JOURNAL, len(whole), data)
        whole += data
        if number % 37 == 0:
            tails = other.tails({JOURNAL: known}, "members")
            assert tails == {JOURNAL: whole[known:]}
            known = len(whole)
    assert other.tails({JOURNAL: known}, "members") == {JOURNAL: whole[known:]}
    assert other.tails({JOURNAL: len(whole)}, "members") == {}
    assert other.fetch(JOURNAL) == whole and other.fetch(JOURNAL, 70_000) == whole[70_000:]
    assert other.names("members/00000000000000aa") == {JOURNAL: len(whole)}
    objects = medium._client.below("members")
    assert len(objects) <= 2 * len(whole) // TAIL_BYTES + 1
    assert max(objects.values()) <= TAIL_BYTES
    medium.remove(JOURNAL)
    assert other.names("members/00000000000000aa") == {} and not medium._client.below("members")


def test_a_batch_that_is_larger_than_an_object(make: Make) -> None:
    medium = make()
    data = os.urandom(3 * TAIL_BYTES)
    medium.append(JOURNAL, 0, data)
    medium.append(JOURNAL, len(data), b"tail")
    assert make().fetch(JOURNAL) == data + b"tail"


def test_an_append_is_repeated_after_an_error(make: Make) -> None:
    medium = make()
    medium.append(JOURNAL, 0, b"first ")
    for _ in range(3):  # the store had written it, and the answer was lost
        medium.append(JOURNAL, 6, b"second ")
    medium.append(JOURNAL, 13, b"third")
    assert make().fetch(JOURNAL) == b"first second third"


def test_names_that_begin_alike(make: Make) -> None:
    medium, other = make(), make()
    for number in (1, 11, 2):
        medium.append(f"members/00000000000000aa/journal-{number}", 0, b"%d" % number)
    medium.append("members/00000000000000ab/journal-1", 0, b"other")
    medium.remove("members/00000000000000aa/journal-1")
    assert other.tails({}, "members") == {
        "members/00000000000000aa/journal-11": b"11",
        "members/00000000000000aa/journal-2": b"2",
        "members/00000000000000ab/journal-1": b"other",
    }
    assert other.folders("members") == ["00000000000000aa", "00000000000000ab"]
    wanted = other.tails({}, "members", lambda name: name.endswith("journal-2"))
    assert wanted == {"members/00000000000000aa/journal-2": b"2"}
    medium.remove_folder("members/00000000000000aa")
    assert other.folders("members") == ["00000000000000ab"]


def test_only_files_two_levels_below_are_tails(make: Make) -> None:
    medium = make()
    medium.replace("collector/epoch-1", b"x")
    medium.append("members/00000000000000aa/deep/journal-1", 0, b"x")
    medium.append("members/stray", 0, b"x")
    assert medium.tails({}, "members") == {}


def test_extents_are_written_and_read(make: Make) -> None:
    medium, other = make(), make()
    pieces = [os.urandom(size) for size in (4096, 1, 9_000_000, 4096)]
    whole = b"".join(pieces)
    assert medium.write_extent("extents/a", iter(pieces)) == len(whole)
    assert other.names("extents") == {"extents/a": len(whole)}
    assert other.read_extent("extents/a", 0, 4096) == whole[:4096]
    assert other.read_extent("extents/a", -4096, 4096) == whole[-4096:]
    assert other.read_extent("extents/a", -100, 10) == whole[-100:-90]
    assert other.read_extent("extents/a", len(whole) - 5, 100) == whole[-5:]
    assert other.read_extent("extents/a", len(whole), 100) == b""
    assert other.read_extent("extents/a", len(whole) + 9, 100) == b""
    assert other.read_extent("extents/a", -2 * len(whole), 10) == whole[:10]
    other.remove("extents/a")
    assert medium.read_extent("extents/a", 0, 1) is None and medium.names("extents") == {}


def test_pieces_that_fail_leave_no_extent(make: Make) -> None:
    medium = make()

    def pieces() -> Iterator[bytes]:
        yield bytes(9_000_000)
        raise OSError(errno.ENOSPC, "the source failed")

    with pytest.raises(OSError, match=r".+"):
        medium.write_extent("extents/a", pieces())
    assert medium.names("extents") == {}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30_000), st.booleans(), st.integers(0, 40_000)), max_size=20),
)
def test_readers_see_what_was_appended(steps: list[tuple[int, bool, int]]) -> None:
    store = MemoryStore()
    medium, other = ObjectMedium(ObjectClient(store)), ObjectMedium(ObjectClient(store))
    whole = b""
    for number, (size, repeated, back) in enumerate(steps):
        data = bytes([number]) * size
        for _ in range(1 + repeated):
            medium.append(JOURNAL, len(whole), data)
        whole += data
        known = max(0, len(whole) - back)
        expected = {JOURNAL: whole[known:]} if back else {}
        assert other.tails({JOURNAL: known}, "members") == expected
    assert other.fetch(JOURNAL) == (whole if steps else None)


class NoConditions(ObjectClient):
    """A store that has no conditional puts."""

    def put_new(self, name: str, data: bytes) -> bool | None:
        return None


def test_one_creates_where_puts_know_no_condition() -> None:
    store = MemoryStore()
    mediums = [ObjectMedium(NoConditions(store), settle_seconds=0.3) for _ in range(8)]
    made: list[int] = []

    def one(number: int) -> None:
        time.sleep(number % 4 * 0.05)
        if mediums[number].create("collector/epoch-1", b"%d" % number):
            made.append(number)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert mediums[0].fetch("collector/epoch-1") == b"%d" % made[0]
    assert not mediums[0].create("collector/epoch-1", b"late")


def test_a_slow_put_without_conditions_is_given_up() -> None:
    class Slow(NoConditions):
        def put(self, name: str, data: bytes) -> None:
            super().put(name, data)
            time.sleep(0.3)

    assert not ObjectMedium(Slow(MemoryStore()), settle_seconds=0.2).create("collector/epoch-1", b"1")


def test_a_create_whose_answer_was_lost_is_ours() -> None:
    class Lossy(ObjectClient):
        lost = True

        def put_new(self, name: str, data: bytes) -> bool | None:
            made = super().put_new(name, data)
            if self.lost:
                raise TimeoutError(errno.ETIMEDOUT, "no answer")
            return made

    store = MemoryStore()
    client = Lossy(store)
    medium = ObjectMedium(client)
    with pytest.raises(TimeoutError):
        medium.create("collector/epoch-1", b"mine")
    client.lost = False
    assert not ObjectMedium(ObjectClient(store)).create("collector/epoch-1", b"theirs")
    assert medium.create("collector/epoch-1", b"mine")


def test_an_extent_is_written_from_another(make: Make) -> None:
    medium = make()
    medium.write_extent("extents/a", [bytes(range(256)) * 100])

    def pieces() -> Iterator[bytes]:
        for number in range(10):
            yield medium.read_extent("extents/a", number * 256, 256) or b""

    assert medium.write_extent("extents/b", pieces()) == 2560
    assert medium.read_extent("extents/b", 0, 9999) == bytes(range(256)) * 10


def test_a_killed_writer_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    code = f"""
        import time
        from kvstrata.config import ObjectStoreTierConfig
        from kvstrata.tiers.shared.object_client import open_client

        client = open_client(ObjectStoreTierConfig(url="file://{tmp_path}/bucket", part_bytes=5 << 20))
        data = bytes(64 << 20)
        print("writing", flush=True)
        while True:
            client.upload("extents/aa-1", data)
            client.delete(["extents/aa-1"])
    """
    extents = tmp_path / "bucket/extents"
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "writing\n"

        def caught() -> bool:
            """Stopped while a part is there."""
            writer.send_signal(signal.SIGSTOP)
            if list(extents.glob("*#*")):
                return True
            writer.send_signal(signal.SIGCONT)
            return False

        eventually(caught, "nothing is written")
        writer.send_signal(signal.SIGKILL)
    medium = ObjectMedium(open_client(local_config(tmp_path / "bucket")))
    assert medium.names("extents") == {} and medium.read_extent("extents/aa-1", 0, 10) is None
    assert list(medium.names("writing")) == ["writing/aa-1"]
    medium.remove("writing/aa-1")
    assert medium.names("writing") == {} and not list(extents.iterdir())


def test_a_server_that_hangs_is_waited_for_only_so_long(
    s3_server: RadosGateway, s3_account: S3Account
) -> None:
    medium = ObjectMedium(open_client(s3_config(s3_account, request_seconds=0.5, retries=0)))
    medium.append(JOURNAL, 0, b"before ")
    s3_server.freeze()
    try:
        for call in (lambda: medium.fetch(JOURNAL), lambda: medium.append(JOURNAL, 7, b"after")):
            with pytest.raises(TimeoutError):
                call()
    finally:
        s3_server.thaw()
    medium.append(JOURNAL, 7, b"after")
    eventually(lambda: medium.fetch(JOURNAL) == b"before after", "an append was lost")


def test_errors_have_the_numbers_of_the_system(s3_account: S3Account) -> None:
    def errors(config: ObjectStoreTierConfig) -> Iterator[OSError]:
        client = open_client(config)
        for call in (
            lambda: client.put("a", b"1"),
            lambda: client.listed("a"),
            lambda: client.upload("a", bytes(10_000_000)),
            lambda: client.put_new("a", b"1"),
        ):
            with pytest.raises(OSError) as caught:
                call()
            assert s3_account.secret_key not in str(caught.value)
            yield caught.value

    config = s3_config(s3_account)
    wrong = dataclasses.replace(config, options={**config.options, "secret_access_key": "guessed"})
    assert {error.errno for error in errors(wrong)} == {errno.EACCES}
    nowhere = dataclasses.replace(config, url="s3://no-such-bucket/p")
    assert {error.errno for error in errors(nowhere)} == {errno.ENOENT}
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        refused = dataclasses.replace(
            config, options={**config.options, "endpoint": endpoint}, request_seconds=1.0, retries=1
        )
        assert {error.errno for error in errors(refused)} == {errno.ECONNREFUSED}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir(mode=0o500)
    client = open_client(local_config(tmp_path / "bucket"))
    with pytest.raises(PermissionError):
        client.put("a", b"1")


def test_configurations_that_cannot_work(tmp_path: Path) -> None:
    for url in (
        "",
        "bucket/prefix",
        "memory:///",
        "s3://",
        "file:///",
        "ftp://host/x",
        "s3:///p",
        "s3://me:key@b/p",
    ):
        with pytest.raises(ConfigError, match="object_store url"):
            open_client(ObjectStoreTierConfig(url=url))
    config = ObjectStoreTierConfig(url="s3://bucket/p", options={"endpointt": "x", "access_key_id": "hush"})
    with pytest.raises(ConfigError, match="endpointt") as caught:
        open_client(config)
    assert "hush" not in str(caught.value) and "hush" not in repr(config)


def test_what_is_shown_of_a_url() -> None:
    assert shown_url("https://me:secret@host/path?sig=secret") == "https://host/path"
    assert shown_url("s3://bucket/a/b") == "s3://bucket/a/b"


def test_a_missing_package_says_what_to_do() -> None:
    code = """
        import sys
        sys.modules["obstore"] = None
        from kvstrata.errors import ConfigError
        try:
            import kvstrata.tiers.shared.object_client
        except ConfigError as error:
            print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert "pip install 'kvstrata[object-store]'" in run.stdout


def test_the_server_is_killed_and_started_again(s3_server: RadosGateway, s3_account: S3Account) -> None:
    medium = ObjectMedium(open_client(s3_config(s3_account, request_seconds=1.0, retries=1)))
    medium.append(JOURNAL, 0, b"before ")
    s3_server.kill()
    try:
        for call in (
            lambda: medium.append(JOURNAL, 7, b"after"),
            lambda: medium.fetch(JOURNAL),
            lambda: medium.names("extents"),
            lambda: medium.create("collector/epoch-1", b"1"),
            lambda: medium.write_extent("extents/a", [bytes(10_000_000)]),
        ):
            with pytest.raises(ConnectionRefusedError):
                call()
    finally:
        s3_server.start()
    medium.append(JOURNAL, 7, b"after")
    assert medium.fetch(JOURNAL) == b"before after"
    assert medium.create("collector/epoch-1", b"1") and medium.names("extents") == {}
