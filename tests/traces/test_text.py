"""Lines and bytes of plain and packed files, and what broken ones say."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.errors import ConfigError, TraceFormatError
from kvstrata.traces import text

zstandard = pytest.importorskip("zstandard")

CONTENT = b"".join(b"%d,some record\n" % number for number in range(200_000))


def pack(kind: str, data: bytes) -> bytes:
    return {"plain": bytes, "gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}[kind](data)


@pytest.mark.parametrize("kind", ["plain", "gz", "zst"])
def test_content_is_the_same_however_packed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "no_suffix"
    path.write_bytes(pack(kind, CONTENT))
    with text.open_bytes(path) as file:
        assert file.read() == CONTENT
    found = list(text.lines(path))
    assert len(found) == 200_000
    assert found[0] == (1, b"0,some record")
    assert found[-1] == (200_000, b"199999,some record")


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_members_one_after_another_and_padding(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "log"
    path.write_bytes(pack(kind, b"a\nb") + pack(kind, b"") + pack(kind, b"c\nd\n") + b"\0" * 100_000)
    assert [line for _, line in text.lines(path)] == [b"a", b"bc", b"d"]


def test_zstd_that_begins_with_a_skippable_frame(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"\x50\x2a\x4d\x18\x03\0\0\0xyz" + pack("zst", b"a\n"))
    assert list(text.lines(path)) == [(1, b"a")]


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_cut_off_names_file_and_line(tmp_path: Path, kind: str, keep: float) -> None:
    path = tmp_path / "log"
    data = pack(kind, CONTENT)
    path.write_bytes(data[: int(len(data) * keep)])
    reached = 0
    with pytest.raises(TraceFormatError, match=r"log.*cut off, in line \d+") as error:
        for number, _ in text.lines(path):
            reached = number
    assert str(error.value).endswith(f"line {reached + 1}")


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_damaged_names_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "log"
    data = bytearray(pack(kind, CONTENT))
    if kind == "gz":
        data[-8] ^= 1  # its checksum
    else:
        data[len(data) // 2 :] = b"\xff" * (len(data) - len(data) // 2)
    path.write_bytes(bytes(data))
    with pytest.raises(TraceFormatError, match=r"log.*damaged.*line \d+"):
        list(text.lines(path))


def test_missing_zstandard_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    path.write_bytes(pack("zst", b"a\n"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvstrata\[traces\]'"):
        text.open_bytes(path)


def test_empty_file_has_no_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"")
    assert list(text.lines(path)) == []


def test_line_without_end_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_LINE_BYTES", 10)
    path = tmp_path / "log"
    path.write_bytes(b"short\n" + b"x" * 11)
    with pytest.raises(TraceFormatError, match="log, line 2: longer than 10 bytes"):
        list(text.lines(path))


@given(st.binary(max_size=300))
def test_lines_are_those_of_split(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("lines") / "log"
    path.write_bytes(b"x" + data)
    expected = (b"x" + data).split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert [line for _, line in text.lines(path)] == [line.rstrip(b"\r") for line in expected]


def test_bad_records_stop_or_count() -> None:
    with pytest.raises(TraceFormatError, match=r"f\.csv, line 7: no number; --skip-bad passes over"):
        text.BadRecords(skip=False).bad("f.csv", 7, "no number")
    skipping = text.BadRecords(skip=True)
    skipping.bad("f.csv", 7, "no number")
    skipping.bad("f.bin", 8, "short", unit="record")
    assert skipping.count == 2
