"""oracleGeneral there and back, its bytes by hand, and CSV columns."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.errors import ConfigError, TraceFormatError
from kvstrata.traces import libcachesim
from kvstrata.traces.builder import TraceBuilder
from kvstrata.traces.libcachesim import CsvColumns
from kvstrata.traces.trace import Trace

RECORDS = [(100, 2**64 - 1, 4096, 3), (100, 7, 512, -1), (102, 2**64 - 1, 4096, -1)]


def pack(records: list[tuple[int, int, int, int]]) -> bytes:
    return b"".join(struct.pack("<IQIq", *record) for record in records)


def unpack(path: Path) -> list[tuple[int, int, int, int]]:
    return list(struct.iter_unpack("<IQIq", path.read_bytes()))


def build(requests: list[tuple[float, list[int]]]) -> Trace:
    builder = TraceBuilder("made", "test")
    for time_s, blocks in requests:
        builder.add(time_s, blocks, sizes=[block + 1 for block in blocks])
    return builder.build()


def test_records_become_requests(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "t.oracleGeneral.zst"
    data = pack(RECORDS)
    for packed in (data, gzip.compress(data), zstandard.ZstdCompressor().compress(data)):
        path.write_bytes(packed)
        for trace in (libcachesim.read(path), libcachesim.read_oracle_general(path)):
            assert trace.ids.tolist() == [0, 1, 0]
            assert trace.starts.tolist() == [0, 1, 2, 3]
            assert trace.time_s.tolist() == [0, 0, 2]
            assert trace.size.tolist() == [4096, 512]
            assert trace.parent.tolist() == [-1, -1]
            assert trace.head.source_format == "oracleGeneral"


def test_size_zero_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    path.write_bytes(pack([(1, 5, 0, -1), *RECORDS]))
    assert libcachesim.read_oracle_general(path).head.accesses == 3


def test_cut_off_record_names_its_number(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    path.write_bytes(pack(RECORDS)[:-1])
    with pytest.raises(TraceFormatError, match=r"t\.bin, record 3: 23 bytes of 24; --skip-bad"):
        libcachesim.read_oracle_general(path)
    trace = libcachesim.read_oracle_general(path, skip_bad=True)
    assert (trace.head.accesses, trace.head.skipped) == (2, 1)


def test_empty(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    path.write_bytes(b"")
    with pytest.raises(TraceFormatError, match=r"t\.bin: no requests"):
        libcachesim.read_oracle_general(path)
    with pytest.raises(TraceFormatError, match=r"t\.bin: no requests"):
        libcachesim.read_csv(path)


def test_written_bytes_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "out"
    libcachesim.write_oracle_general(build([(10.0, [3, 4]), (11.9, [3]), (12.0, [3, 4, 5])]), path)
    assert unpack(path) == [
        (0, 0, 4, 3), (0, 1, 5, 5), (1, 0, 4, 4), (2, 0, 4, -1), (2, 1, 5, -1), (2, 2, 6, -1),
    ]  # fmt: skip
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@given(
    st.lists(st.tuples(st.integers(0, 5).map(float), st.lists(st.integers(0, 12), max_size=6)), min_size=1),
    st.integers(1, 9),
)
def test_written_and_read_again(
    tmp_path_factory: pytest.TempPathFactory, requests: list[tuple[float, list[int]]], max_accesses: int
) -> None:
    made = build(requests)

    class Small:
        head = made.head

        def batches(self, unused: int = 0):  # type: ignore[no-untyped-def]
            return made.batches(max_accesses)

    path = tmp_path_factory.mktemp("oracle") / "t.oracleGeneral"
    libcachesim.write_oracle_general(Small(), path)
    ids = made.ids.tolist()
    following = [
        next((later + 1 for later in range(place + 1, len(ids)) if ids[later] == ids[place]), -1)
        for place in range(len(ids))
    ]
    assert [record[3] for record in unpack(path)] == following
    if not ids:
        return
    back = libcachesim.read(path)
    assert back.ids.tolist() == ids
    assert back.size.tolist() == made.size.tolist()
    assert (back.time_s + unpack(path)[0][0]).tolist() == np.repeat(
        made.time_s, np.diff(made.starts)
    ).tolist()


@pytest.mark.parametrize("what", ["size", "time"])
def test_what_does_not_fit_is_not_written(tmp_path: Path, what: str) -> None:
    builder = TraceBuilder("made", "test")
    builder.add(0, [1], sizes=[2**32 if what == "size" else 1])
    builder.add(2.0**32 if what == "time" else 1, [2], sizes=[1])
    with pytest.raises(TraceFormatError, match="32 bits"):
        libcachesim.write_oracle_general(builder.build(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_recognise_oracle_general() -> None:
    recognise = libcachesim.recognise_oracle_general
    path = Path("t.bin")
    assert recognise(path, pack(RECORDS))
    assert recognise(path, pack(RECORDS)[:-5])
    assert recognise(path, pack([(1, 1, 1, 2**63 - 1)]))
    assert not recognise(path, pack([(1, 1, 1, -2)]))
    assert not recognise(path, pack([(2, 1, 1, -1), (1, 1, 1, -1)]))
    for other in (b"", b"1,2,3\n" * 50, b'{"timestamp": 27482, "input_length": 6955}\n', b"PAR1" * 30):
        assert not recognise(path, other)
    assert not recognise(Path("t.oracleGeneral.txt"), b"1,2,3\n" * 50)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("time-col=1,obj-id-col=2,obj-size-col=3,delimiter=,", CsvColumns(1, 2, 3, ",")),
        (
            "time-col=1, obj-id-col=2, obj-size-col=3, delimiter=,,has-header=true",
            CsvColumns(1, 2, 3, ",", True),
        ),
        ("delimiter=,,time_col=2,obj_id_col=5,size-col=4", CsvColumns(2, 5, 4, ",")),
        ("delimiter=\\t,obj-id-col=1,obj-id-is-num=true", CsvColumns(0, 1, 0, "\t")),
        ("delimiter=\t, has-header=false, obj-id-col=1", CsvColumns(0, 1, 0, "\t", False)),
        ("delimiter=;,obj-id-col=9", CsvColumns(0, 9, 0, ";")),
    ],
)
def test_column_parameters(text: str, expected: CsvColumns) -> None:
    assert CsvColumns.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "time-col=1", "obj-id-col=0", "obj-id-col=x", "obj-id-col", "colour=3,obj-id-col=1"]
)
def test_column_parameters_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError, match="CSV columns"):
        CsvColumns.parse(text)


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ("time,obj_id,size\n5,a,10\n4,b,20\n5,a,10\n", None),
        ("5,a,10\n4,b,20\n5,a,10\n", None),
        ("\ufeff5|a|10\r\n4|b|20\r\n5|a|10\r\n", None),
        ("time, obj id, obj size\n5, a, 10\n4, b, 20\n5, a, 10\n", None),
        ("5 a 10\n4 b 20\n5 a 10\n", None),
        ("Size\tTimestamp\tKey\n10\t5\ta\n20\t4\tb\n10\t5\ta", None),
        ("x;10;5;a\nx;20;4;b\n\nx;10;5;a\n", "time-col=3,obj-id-col=4,obj-size-col=2,delimiter=;"),
        ("who,what,when,bytes\nx,a,5,10\nx,b,4,20\nx,a,5,10\n", "time-col=3,obj-id-col=2,obj-size-col=4"),
        ('5,"a",10\n4,"b",20\n5,a,10\n', "time-col=1,obj-id-col=2,obj-size-col=3,has-header=false"),
    ],
)  # fmt: skip
def test_csv_columns(tmp_path: Path, content: str, columns: str | None) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content, newline="")
    trace = libcachesim.read(path, csv_columns=columns)
    assert trace.head.source_format == "libcachesim-csv"
    assert trace.ids.tolist() == [0, 1, 1]
    assert trace.size.tolist() == [20, 10]
    assert trace.time_s.tolist() == [0, 1, 1]


def test_csv_without_time_and_size(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a\nb\na\n")
    trace = libcachesim.read_csv(path, csv_columns="obj-id-col=1,has-header=false")
    assert trace.ids.tolist() == [0, 1, 0]
    assert trace.time_s.tolist() == [0, 1, 2]
    assert trace.head.block_bytes == 1


@pytest.mark.parametrize("row", ["4,b", "x,b,3", "inf,b,3", "4,b,-3", "4,b,1.5", "4,,3"])
def test_broken_rows(tmp_path: Path, row: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"time,id,size\n1,a,1\n{row}\n2,a,1\n")
    with pytest.raises(TraceFormatError, match=r"t\.csv, line 3: .*--skip-bad"):
        libcachesim.read_csv(path)
    trace = libcachesim.read_csv(path, skip_bad=True)
    assert (trace.head.requests, trace.head.skipped) == (2, 1)


def test_csv_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("hello\n")
    with pytest.raises(TraceFormatError, match=r"t\.csv, line 1: .*time-col=1"):
        libcachesim.read_csv(path)


def test_recognise_csv() -> None:
    path = Path("t.csv")
    for known in (b"1,2,3\n", b"timestamp,key,size,op\n", b"0.5\tx\t7"):
        assert libcachesim.recognise_csv(path, known)
        assert libcachesim.recognise(path, known)
    for other in (
        b"",
        b"a,b,c\n",
        b'{"time": 1, "id": 2, "size": 3}\n',
        b"1,2\n",
        pack(RECORDS),
        b"1,2,3" * 20_000,
    ):
        assert not libcachesim.recognise_csv(path, other)


def test_more_than_one_chunk(tmp_path: Path) -> None:
    count = 3 << 18
    records = np.zeros(count, libcachesim.RECORD)
    records["object"] = np.arange(count, dtype=np.uint64) % 1000 << 40
    records["size"] = 8
    records["time"] = np.arange(count)
    path = tmp_path / "t.bin"
    records.tofile(path)
    trace = libcachesim.read_oracle_general(path)
    assert (trace.ids == np.arange(count) % 1000).all()
    assert trace.head.block_bytes == 8
