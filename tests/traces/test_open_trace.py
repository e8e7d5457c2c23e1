"""One door: the format is told by what is inside, whatever the name and the packing."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import pytest
import zstandard
from agentic_kit import agent, conversation, turn, write

from kvstrata.errors import ConfigError, TraceFormatError
from kvstrata.traces import mooncake
from kvstrata.traces.open import FORMATS, open_trace, recognise
from kvstrata.traces.parquet import write_parquet

CONVERSATION = json.dumps(conversation([turn(0, [1, 2]), agent(1, [turn(0, [5])])])).encode()
MOONCAKE = b"".join(
    json.dumps(
        {"timestamp": n * 1000, "input_length": 700, "output_length": 3, "hash_ids": [0, n + 1]}
    ).encode()
    + b"\n"
    for n in range(30)
)
MLPERF = b"Timestamp,Operation,Object_Size_Bytes,Tier,Key,Phase\n1.5,Write,100,Tier-0,a_turn_1,Prefill\n"
CSV = b"time,obj_id,size\n1,a,10\n2,b,20\n3,a,10\n"
ORACLE = b"".join(struct.pack("<IQIq", n, n, 512, -1) for n in range(50))
STRACE = (
    b'100 1700000000.000001 openat(AT_FDCWD</root>, "/data/f", O_RDONLY) = 3</data/f> <0.000010>\n'
    b'100 1700000000.000100 pread64(3</data/f>, "x"..., 4096, 0) = 4096 <0.000020>\n'
)
CONTENTS = {
    "agentic": CONVERSATION,
    "mooncake": MOONCAKE,
    "mlperf": MLPERF,
    "libcachesim-csv": CSV,
    "oracleGeneral": ORACLE,
    "strace": STRACE,
}


@pytest.mark.parametrize("format", sorted(CONTENTS))
@pytest.mark.parametrize("packing", ["plain", "gzip", "zstd"])
def test_the_content_tells(tmp_path: Path, format: str, packing: str) -> None:
    pack = {"plain": bytes, "gzip": gzip.compress, "zstd": zstandard.ZstdCompressor().compress}[packing]
    path = tmp_path / "trace.dat"
    path.write_bytes(pack(CONTENTS[format]))
    assert recognise(path) == format
    source = open_trace(path)
    assert source.head.source_format == format
    assert sum(batch.requests for batch in source.batches()) == source.head.requests > 0


def test_parquet_and_folders(tmp_path: Path) -> None:
    write(tmp_path / "a.json", conversation([turn(0, [1, 2, 3, 4])]))
    assert recognise(tmp_path) == "stream"
    trace = open_trace(tmp_path, seed=5, mean_arrival_s=1)
    assert trace.head.source_format == "stream" and trace.head.block_tokens == 256
    write_parquet(trace, tmp_path / "x")
    assert recognise(tmp_path / "x") == "parquet"
    assert open_trace(tmp_path / "x").head == trace.head


def test_every_format_has_a_test() -> None:
    assert set(CONTENTS) | {"parquet", "stream"} == set(FORMATS)


@pytest.mark.parametrize(
    "content",
    [
        b"hello\n",
        b"\0" * 100,
        b"{}",
        b'{"hash_ids": [1]}\n',
        b"[]",
        b"\x7fELF" + bytes(range(200)),
        b"a,b\n1,2\n",
    ],
)
def test_an_unknown_format_lists_the_known_ones(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(TraceFormatError, match="--format") as error:
        open_trace(path)
    assert str(path) in str(error.value)
    assert all(name in str(error.value) for name in FORMATS)


def test_what_cannot_be_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(b"")
    with pytest.raises(TraceFormatError, match="empty"):
        open_trace(path)
    path.write_bytes(gzip.compress(MOONCAKE)[:-9])
    with pytest.raises(TraceFormatError, match="cut off"):
        open_trace(path)
    with pytest.raises(FileNotFoundError):
        open_trace(tmp_path / "absent")


def test_a_format_that_is_given(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(b"\n" + b" \n" * 3 + MOONCAKE)
    assert open_trace(path, format="mooncake").head.requests == 30
    with pytest.raises(TraceFormatError, match="t: "):
        open_trace(path, format="agentic")
    with pytest.raises(ConfigError, match="no trace format 'tar'; there are agentic, "):
        open_trace(path, format="tar")
    with pytest.raises(ConfigError, match="no folder"):
        open_trace(path, format="stream")
    with pytest.raises(ConfigError, match="a folder"):
        open_trace(tmp_path, format="mooncake")


@pytest.mark.parametrize("format", sorted(CONTENTS))
def test_block_sizes(tmp_path: Path, format: str) -> None:
    path = tmp_path / "t"
    path.write_bytes(CONTENTS[format])
    source = open_trace(path, block_bytes=4096)
    assert source.head.block_bytes == 4096
    assert all((batch.sizes == 4096).all() for batch in source.batches())


def test_bytes_per_token(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(MOONCAKE)
    (tmp_path / "a").write_bytes(CONVERSATION)
    assert open_trace(tmp_path / "m", bytes_per_token=3).head.block_bytes == 512 * 3
    assert open_trace(tmp_path / "a", bytes_per_token=3, block_tokens=128).head.block_bytes == 128 * 3
    write_parquet(mooncake.read(tmp_path / "m"), tmp_path / "p")
    assert open_trace(tmp_path / "p", block_bytes=5).head.block_bytes == 5


@pytest.mark.parametrize("option", ["block_bytes", "bytes_per_token", "block_tokens"])
@pytest.mark.parametrize("value", [0, -1, 2**40])
def test_sizes_that_cannot_be(tmp_path: Path, option: str, value: int) -> None:
    (tmp_path / "t").write_bytes(MOONCAKE)
    with pytest.raises(ConfigError, match=option):
        open_trace(tmp_path / "t", **{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["mooncake", "mlperf", "libcachesim-csv"])
def test_broken_lines_are_counted(tmp_path: Path, format: str) -> None:
    path = tmp_path / "t.gz"
    path.write_bytes(gzip.compress(CONTENTS[format] + b"broken\n"))
    with pytest.raises(TraceFormatError, match=r"t\.gz, line \d+: "):
        open_trace(path)
    assert open_trace(path, skip_bad=True).head.skipped == 1
