"""MLPerf KV I/O logs. The rows are written after the benchmark's documented columns and the forms that its
keys have in its source: turns, requests, system prompts, chunks of documents."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.errors import TraceFormatError
from kvstrata.traces import mlperf

HEADER = "Timestamp,Operation,Object_Size_Bytes,Tier,Key,Phase"
ROWS = [
    "1740553426.194021,Write,402653184,Tier-0,conv_user_0003_1740553426_turn_1,Prefill",
    "1740553426.194308,Read,402653184,Tier-0,conv_user_0003_1740553426_turn_1,Decode",
    "1740553426.194290,Read,1310720,Tier-2,kv_system_9f86d081884c7d65,Decode",
    "1740553426.194521,Read,402653184,Tier-0,conv_user_0003_1740553426_turn_1,Evict",
    "1740553426.194530,Write,402653184,Tier-1,conv_user_0003_1740553426_turn_1,Evict",
    "1740553427.000001,Write,67108864,Tier-1,rag_doc_0001_chunk_3,Prefill",
    "1740553427.100000,Write,131072000,Tier-0,conv_user_0003_1740553426_turn_2,Both",
    "1740553427.200000,Read,402653184,Tier-1,conv_user_0003_1740553426_turn_1,Decode",
    "1740553428.000000,Write,262144,Tier-0,user_0001_req_000017,Prefill",
]


def write(path: Path, *rows: str, header: str = HEADER) -> Path:
    path.write_text("".join(f"{row}\r\n" for row in (header, *rows)), newline="")
    return path


def operations(trace: mlperf.Trace) -> list[str]:
    return [trace.head.labels["operation"][code] for code in trace.features["operation"]]


def test_rows_become_requests_in_order_of_time(tmp_path: Path) -> None:
    trace = mlperf.read(write(tmp_path / "kv.csv", *ROWS))
    assert trace.head.source_format == "mlperf"
    assert trace.head.name == "kv.csv"
    assert trace.ids.tolist() == [0, 1, 0, 2, 3, 0, 4]
    assert trace.size.tolist() == [402653184, 1310720, 67108864, 131072000, 262144]
    assert operations(trace) == ["write", "read", "read", "write", "write", "read", "write"]
    assert trace.parent.tolist() == [-1] * 5
    assert trace.depth.tolist() == [0] * 5
    assert trace.session.tolist() == [0, -1, 0, -1, 0, 0, -1]
    assert trace.time_s[0] == 0
    assert trace.time_s[1] == pytest.approx(0.000269, abs=1e-6)
    assert trace.head.block_bytes == 0


def test_moves_between_tiers_on_request(tmp_path: Path) -> None:
    trace = mlperf.read(write(tmp_path / "kv.csv", *ROWS), demotions=True)
    assert trace.ids.tolist() == [0, 1, 0, 0, 0, 2, 3, 0, 4]


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    old = write(tmp_path / "old.csv", "2.5,Read,7,Tier-0,k", header=HEADER.rsplit(",", 1)[0])
    assert mlperf.read(old).size.tolist() == [7]
    other = write(
        tmp_path / "new.csv", 'x,"a,b",9,write,1', header="Node,Key,Object_Size_Bytes,Operation,Timestamp"
    )
    assert mlperf.read(other).size.tolist() == [9]


def test_packed_and_concatenated(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    plain = mlperf.read(write(tmp_path / "kv.csv", *ROWS))
    data = (tmp_path / "kv.csv").read_bytes()
    for packed in (gzip.compress(data), zstandard.ZstdCompressor().compress(data)):
        (tmp_path / "kv.csv.zst").write_bytes(packed + packed)
        trace = mlperf.read(tmp_path / "kv.csv.zst")
        assert trace.head.accesses == 2 * plain.head.accesses
        assert trace.head.unique == plain.head.unique
        (tmp_path / "kv.csv.zst").write_bytes(packed[:-9])
        with pytest.raises(TraceFormatError, match=r"kv\.csv\.zst.*cut off, in line"):
            mlperf.read(tmp_path / "kv.csv.zst")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("1.0,Read,7,Tier-0,k", "5 columns of 6"),
        ("now,Read,7,Tier-0,k,Decode", "could not convert"),
        ("nan,Read,7,Tier-0,k,Decode", "finite"),
        ("1.0,Erase,7,Tier-0,k,Decode", "Erase"),
        ("1.0,Read,seven,Tier-0,k,Decode", "invalid literal"),
        ("1.0,Read,0,Tier-0,k,Decode", "above 0"),
        ("1.0,Read,99999999999999999999,Tier-0,k,Decode", "size"),
        ("1.0,Read,7,Tier-0,,Decode", "key"),
    ],
)
def test_broken_rows(tmp_path: Path, row: str, why: str) -> None:
    path = write(tmp_path / "kv.csv", ROWS[0], row, ROWS[1])
    with pytest.raises(TraceFormatError, match=rf"kv\.csv, line 3: .*{why}.*--skip-bad"):
        mlperf.read(path)
    trace = mlperf.read(path, skip_bad=True)
    assert (trace.head.skipped, trace.head.requests) == (1, 2)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "kv.csv", *ROWS)
    path.write_bytes(path.read_bytes() + b"1.0,Read,7,Tier-0,\xff,Decode\r\n")
    assert mlperf.read(path, skip_bad=True).head.skipped == 1


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(TraceFormatError, match=r"kv\.csv: no requests"):
        mlperf.read(write(tmp_path / "kv.csv"))
    with pytest.raises(TraceFormatError, match="line 1: no MLPerf"):
        mlperf.read(write(tmp_path / "kv.csv", header="time,id,size"))
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(TraceFormatError, match="no requests"):
        mlperf.read(tmp_path / "empty")


def test_recognise() -> None:
    path = Path("any")
    assert mlperf.recognise(path, HEADER.encode() + b"\r\n1,")
    assert mlperf.recognise(path, b"\xef\xbb\xbf" + HEADER.encode())
    for other in (b"", b"time,id,size\n", b'{"timestamp": 1}\n', b"\0" * 100):
        assert not mlperf.recognise(path, other)


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abcd"), st.integers(1, 99)), min_size=1))
def test_out_of_order_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, str, int]]
) -> None:
    path = tmp_path_factory.mktemp("mlperf") / "kv.csv"
    write(path, *(f"{time}.5,Read,{size},Tier-0,{key},Decode" for time, key, size in rows))
    trace = mlperf.read(path)
    ordered = sorted(rows, key=lambda row: row[0])
    keys = list(dict.fromkeys(key for _, key, _ in ordered))
    assert [keys[number] for number in trace.ids] == [key for _, key, _ in ordered]
    assert trace.time_s.tolist() == [time - ordered[0][0] for time, _, _ in ordered]
    assert trace.size.tolist() == [next(size for _, key, size in ordered if key == name) for name in keys]
