"""`kvstrata verify`: every kind of damage is found, named and, if asked, dropped; good blocks stay."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from cli_kit import Folder, assert_one_error, assert_program_error, make_folder, open_store, run_program
from typer.testing import Result

from faulty_io import FaultyIO
from kvstrata.errors import TierUnavailableError
from kvstrata.tiers.nvme_format import SlotHeader, slot_offset
from kvstrata.tiers.nvme_verify import REASONS, verify_folder
from kvstrata.transfer.buffers import PAGE

Run = Callable[..., Result]
STRIDE = PAGE + 20_480


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


def read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def write(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def header_with_length(path: Path, number: int, length: int) -> bytes:
    """An intact header that claims another payload length."""
    page = bytearray(read(path, slot_offset(number, STRIDE), PAGE))
    old = SlotHeader.unpack(memoryview(page))
    assert old is not None
    SlotHeader(
        old.key, old.namespace, old.segment_id, old.number, length, old.checksum, old.sequence,
        old.created_ms, old.expires_ms,
    ).pack_into(memoryview(page))  # fmt: skip
    return bytes(page)


def flip_payload(path: Path) -> None:
    flip(path, slot_offset(2, STRIDE) + PAGE + 12_345)


def flip_last_byte(path: Path) -> None:
    flip(path, slot_offset(2, STRIDE) + PAGE + 19_999)


def flip_header(path: Path) -> None:
    flip(path, slot_offset(2, STRIDE) + 40)


def zero_slot(path: Path) -> None:
    write(path, slot_offset(2, STRIDE), bytes(STRIDE))


def swap_slots(path: Path) -> None:
    one, two = (read(path, slot_offset(number, STRIDE), STRIDE) for number in (2, 3))
    write(path, slot_offset(3, STRIDE), one)
    write(path, slot_offset(2, STRIDE), two)


def claim_too_much(path: Path) -> None:
    write(path, slot_offset(2, STRIDE), header_with_length(path, 2, 10**6))


def claim_nothing(path: Path) -> None:
    write(path, slot_offset(2, STRIDE), header_with_length(path, 2, 0))


def cut_at_slot(path: Path) -> None:
    slots = (path.stat().st_size - PAGE) // STRIDE
    os.truncate(path, slot_offset(slots - 2, STRIDE))


def cut_in_payload(path: Path) -> None:
    slots = (path.stat().st_size - PAGE) // STRIDE
    os.truncate(path, slot_offset(slots - 1, STRIDE) + PAGE + 777)


def flip_segment_header(path: Path) -> None:
    flip(path, 20)


def copy_segment(path: Path) -> None:
    shutil.copy(path, path.with_name("seg-00000000000000ff.kv"))


def remove_segment(path: Path) -> None:
    path.unlink()


def flip_index(path: Path) -> None:
    flip(path.parent / "index.kv", 100)


def other_block_in_slot(path: Path) -> None:
    """A write that the disk lost: an older block is still there, whole and in its place."""
    slots = slot_offset(2, STRIDE)
    old = SlotHeader.unpack(memoryview(read(path, slots, PAGE)))
    assert old is not None
    page = bytearray(PAGE)
    SlotHeader(
        bytes(32), old.namespace, old.segment_id, old.number, old.length, old.checksum, 0, 1, 0
    ).pack_into(memoryview(page))
    write(path, slots, bytes(page))


DAMAGE: list[tuple[Callable[[Path], None], dict[str, int]]] = [
    (flip_payload, {"checksum": 1}),
    (flip_last_byte, {"checksum": 1}),
    (flip_header, {"damaged": 1}),
    (zero_slot, {"lost": 1}),
    (swap_slots, {"misplaced": 2}),
    (claim_too_much, {"length": 1}),
    (claim_nothing, {"length": 1}),
    (cut_at_slot, {"missing": 2}),
    (cut_in_payload, {"short": 1}),
    (flip_segment_header, {"segment_header": 1, "segment_missing": 1}),
    (copy_segment, {"segment_header": 1}),
    (remove_segment, {"segment_missing": 1}),
    (flip_index, {"index_damaged": 1}),
    (other_block_in_slot, {"replaced": 1}),
]


def look(run: Run, path: Path, *options: str, code: int) -> dict[str, Any]:
    result = run("verify", path, "--json", *options)
    assert (result.exit_code, result.stderr) == (code, ""), result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_good_folder(run: Run, folder: Folder) -> None:
    found = look(run, folder.path, code=0)
    assert found["good"] and not found["repaired"] and found["bad"] == []
    assert found["checked_blocks"] == found["good_blocks"] == 40
    assert found["payload_bytes"] == 40 * 20_000
    assert found["slots"] == 40 + found["empty_slots"]
    assert "all good" in run("verify", folder.path).stdout
    with open_store(folder.path) as store:
        assert store.status()[0].open_report.from_index  # verifying did not cost the index
    assert all(folder.readable())


@pytest.mark.parametrize(("damage", "reasons"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_damage_is_found_named_and_dropped(
    run: Run, folder: Folder, damage: Callable[[Path], None], reasons: dict[str, int]
) -> None:
    damage(folder.segments[0])
    left = {path.name: path.read_bytes() for path in folder.path.glob("*.kv")}
    found = look(run, folder.path, code=1)
    assert found["by_reason"] == reasons
    assert not found["good"] and not found["repaired"]
    assert {path.name: path.read_bytes() for path in folder.path.glob("*.kv")} == left

    result = run("verify", folder.path)
    assert result.exit_code == 1
    assert all(reason in result.stdout for reason in reasons)
    assert "--repair" in result.stdout

    repaired = look(run, folder.path, "--repair", code=0)
    assert repaired["repaired"] and repaired["by_reason"] == reasons
    assert not (folder.path / "index.kv").exists()
    after = look(run, folder.path, code=0)
    assert after["good"] and after["good_blocks"] == found["good_blocks"]
    assert sum(folder.readable()) == found["good_blocks"]


def test_all_reasons_have_a_test() -> None:
    tested = {reason for _, reasons in DAMAGE for reason in reasons}
    assert tested | {"io_error"} == set(REASONS)


def test_bad_blocks_are_named(run: Run, folder: Folder) -> None:
    segment = folder.segments[1]
    header = SlotHeader.unpack(memoryview(read(segment, slot_offset(2, STRIDE), PAGE)))
    assert header is not None
    flip_payload(segment)
    (bad,) = look(run, folder.path, code=1)["bad"]
    assert (bad["file"], bad["slot"], bad["reason"]) == (segment.name, 2, "checksum")
    assert bad["key"] == header.key.hex() and bad["namespace"] == folder.namespace.digest.hex()
    text = run_program("verify", folder.path)
    assert text.returncode == 1 and text.stderr == ""
    assert segment.name in text.stdout and header.key.hex()[:16] in text.stdout
    dropped = run_program("verify", folder.path, "--repair")
    assert dropped.returncode == 0 and "dropped 1" in dropped.stdout
    served = dict(zip(folder.keys, folder.readable(), strict=True))
    assert [key for key, good in served.items() if not good] == [header.key]


def test_long_lists_are_cut_for_people_only(run: Run, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "kv", 90)
    for segment in folder.segments:
        for number in range((segment.stat().st_size - PAGE) // STRIDE):
            flip(segment, slot_offset(number, STRIDE) + PAGE)
    assert len(look(run, folder.path, code=1)["bad"]) == 90
    assert "and 40 more; --json lists all" in run("verify", folder.path).stdout


def test_after_a_crash_there_is_no_index_to_compare_with(run: Run, folder: Folder) -> None:
    (folder.path / "index.kv").unlink()
    assert look(run, folder.path, code=0)["index"] == "absent"
    flip_payload(folder.segments[0])
    assert look(run, folder.path, code=1)["by_reason"] == {"checksum": 1}


def test_folder_in_use(run: Run, tmp_path: Path) -> None:
    with open_store(tmp_path / "kv"):
        for options in ([], ["--repair"], ["--json"]):
            result = run_program("verify", tmp_path / "kv", *options)
            assert_program_error(result, "in use by process", str(os.getpid()))
    assert look(run, tmp_path / "kv", code=0)["good"]


def test_the_folder_is_free_again_afterwards(run: Run, folder: Folder) -> None:
    flip_payload(folder.segments[0])
    for _ in range(2):
        look(run, folder.path, code=1)
    assert sum(folder.readable()) == 39


def test_no_kvstrata_folder(run: Run, tmp_path: Path) -> None:
    assert_one_error(run("verify", tmp_path / "no"), "no such folder")
    assert_one_error(run("verify", tmp_path, "--repair"), "not a kvstrata folder")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert_one_error(run("verify", tmp_path / "file"), "not a folder")


def sick_slot(size: int) -> FaultyIO:
    """A disk where one of the payloads cannot be read."""

    class SickIO(FaultyIO):
        def read(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
            if offset == slot_offset(2, STRIDE) + PAGE and os.fstat(fd).st_size == size:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read(fd, views, offset)

    return SickIO()


def test_a_slot_that_cannot_be_read_is_bad_and_the_rest_is_checked(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "kv", 15)
    (segment,) = folder.segments
    io = sick_slot(segment.stat().st_size)
    report = verify_folder(folder.path, lambda done, total: None, io=io)
    assert report.by_reason == {"io_error": 1} and report.good_blocks == 14
    assert verify_folder(folder.path, lambda done, total: None, io=io, repair=True).repaired
    assert sum(folder.readable()) == 14


def test_a_disk_that_takes_no_repair_is_an_error_that_names_the_file(folder: Folder) -> None:
    flip_payload(folder.segments[0])
    io = FaultyIO()
    io.fail(errno.EROFS, "write")
    with pytest.raises(TierUnavailableError, match=folder.segments[0].name):
        verify_folder(folder.path, lambda done, total: None, io=io, repair=True)
    assert sum(folder.readable()) == 39  # the lock was given back, and the block is still no hit


def test_progress_reaches_the_end(folder: Folder) -> None:
    told: list[tuple[int, int]] = []
    report = verify_folder(folder.path, lambda done, total: told.append((done, total)))
    assert told[-1] == (report.slots, report.slots)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_small_file_systems_without_direct_io(folder: Folder) -> None:
    class BufferedIO(FaultyIO):
        def open(self, path: Path, *, create: bool, direct: bool) -> int:
            if direct:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return super().open(path, create=create, direct=direct)

    flip_payload(folder.segments[0])
    report = verify_folder(folder.path, lambda done, total: None, io=BufferedIO())
    assert report.by_reason == {"checksum": 1}
