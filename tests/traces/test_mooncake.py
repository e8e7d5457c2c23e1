"""Mooncake JSON lines: every field by hand, broken records by place, and the published trace's counts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from trace_kit import assert_sound

from kvstrata.errors import TraceFormatError
from kvstrata.traces import mooncake
from open_traces import CONVERSATION as WHOLE

SAMPLE = Path(__file__).parents[1] / "data" / "mooncake_conversation_300.jsonl"

GOOD = [
    {"timestamp": 5000, "input_length": 1100, "output_length": 7, "hash_ids": [40, 41, 42]},
    {"timestamp": 3000, "input_length": 600, "output_length": 9, "hash_ids": [40, 50]},
    {"timestamp": 6500, "input_length": 0, "output_length": 1, "hash_ids": []},
]


def write(path: Path, records: list[object]) -> Path:
    text = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def test_every_field(tmp_path: Path) -> None:
    trace = mooncake.read(write(tmp_path / "t.jsonl", GOOD), bytes_per_token=10)
    assert trace.head.name == "t.jsonl"
    assert (trace.head.block_tokens, trace.head.block_bytes) == (512, 5120)
    assert (trace.head.requests, trace.head.accesses, trace.head.unique) == (3, 5, 4)
    assert trace.time_s.tolist() == [0, 2, 3.5]
    assert trace.starts.tolist() == [0, 2, 5, 5]
    assert trace.ids.tolist() == [0, 1, 0, 2, 3]
    assert trace.parent.tolist() == [-1, 0, 0, 2]
    assert trace.depth.tolist() == [0, 1, 1, 2]
    assert trace.size.tolist() == [5120] * 4
    assert trace.features["input_tokens"].tolist() == [600, 1100, 0]
    assert trace.features["output_tokens"].tolist() == [9, 7, 1]
    assert (trace.session == -1).all() and (trace.tenant == -1).all()


def test_full_blocks_only(tmp_path: Path) -> None:
    """1100 tokens fill two blocks of 512, 600 one, and a request without a length keeps its ids."""
    records = [*GOOD, {"timestamp": 9000, "hash_ids": [60, 61]}]
    trace = mooncake.read(write(tmp_path / "t.jsonl", records), full_blocks=True)
    assert trace.starts.tolist() == [0, 1, 3, 3, 5]
    assert trace.ids.tolist() == [0, 0, 1, 2, 3]


def test_64_bit_hashes(tmp_path: Path) -> None:
    chains = [[2**64 - 1, 5], [2**64 - 1, 5], [5 - 2**63, -1], [5, 2**63 + 5]]
    records = [{"timestamp": n, "hash_ids": chain} for n, chain in enumerate(chains)]
    trace = mooncake.read(write(tmp_path / "t", [*records]))
    assert trace.ids.tolist() == [0, 1, 0, 1, 2, 3, 1, 4]


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ("{", "no JSON"),
        ("\x00\xff", "no JSON"),
        ("[" * 100_000, "nested too deeply"),
        ([1], "where a JSON object belongs"),
        ({"timestamp": 1}, "no hash_ids"),
        ({"hash_ids": [1]}, "no timestamp"),
        ({"timestamp": "1", "hash_ids": [1]}, "timestamp is '1', not a number"),
        ('{"timestamp": NaN, "hash_ids": [1]}', "timestamp is nan"),
        ('{"timestamp": 1e999, "hash_ids": [1]}', "timestamp is inf"),
        ({"timestamp": 10**400, "hash_ids": [1]}, "not a number"),
        ({"timestamp": True, "hash_ids": [1]}, "timestamp is True"),
        ({"timestamp": 1, "hash_ids": "12"}, "hash_ids is '12', not a list"),
        ({"timestamp": 1, "hash_ids": [1.5]}, "integers"),
        ({"timestamp": 1, "hash_ids": ["a", 1]}, "integers"),
        ({"timestamp": 1, "hash_ids": [[1], 2]}, "integers"),
        ({"timestamp": 1, "hash_ids": [2**64]}, "integers of 64 bits"),
        ({"timestamp": 1, "hash_ids": [2**63, -1]}, "integers of 64 bits"),
        ({"timestamp": 1, "hash_ids": [True, 2]}, "integers"),
        ({"timestamp": 1, "hash_ids": [1, 2, 1]}, "a block twice"),
        ({"timestamp": 1, "hash_ids": [1], "input_length": -1}, "input_length is -1"),
        ({"timestamp": 1, "hash_ids": [1], "output_length": 0.5}, "output_length is 0.5"),
    ],
)
@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_a_broken_record_names_its_line(tmp_path: Path, name: str, record: object, why: str) -> None:
    path = write(tmp_path / name, [GOOD[0], "", record, GOOD[1]])
    with pytest.raises(TraceFormatError) as error:
        mooncake.read(path)
    assert f"{path}, line 3: " in str(error.value) and why in str(error.value)
    trace = mooncake.read(path, skip_bad=True)
    assert (trace.head.requests, trace.head.skipped) == (2, 1)


def test_a_truncated_gz(tmp_path: Path) -> None:
    path = tmp_path / "t.gz"
    path.write_bytes(gzip.compress(SAMPLE.read_bytes())[:-1000])
    with pytest.raises(TraceFormatError, match=r"t\.gz.*cut off.*line \d+"):
        mooncake.read(path)


def test_other_block_sizes_are_noticed(tmp_path: Path) -> None:
    records = [
        {"timestamp": n, "input_length": 64, "hash_ids": [4 * n + k for k in range(4)]} for n in range(9)
    ]
    path = write(tmp_path / "t", records)
    with pytest.raises(TraceFormatError, match="--block-tokens"):
        mooncake.read(path)
    assert mooncake.read(path, block_tokens=16).head.block_tokens == 16


def test_the_sample() -> None:
    trace = mooncake.read(SAMPLE)
    assert (trace.head.requests, trace.head.accesses, trace.head.unique) == (300, 8490, 7814)
    assert_sound(trace)


def test_the_whole_trace() -> None:
    if not WHOLE.exists():
        pytest.skip(f"the whole trace is not there: {Path(*WHOLE.parts[-5:])} beside the repository")
    trace = mooncake.read(WHOLE)
    assert (trace.head.requests, trace.head.accesses, trace.head.unique) == (12_031, 288_500, 182_790)
    assert trace.head.block_bytes == 64 * 2**20
    assert trace.time_s[0] == 0 and 3536 < trace.time_s[-1] < 3537
    assert int(np.diff(trace.starts).max()) == int(trace.depth.max()) + 1
    assert_sound(trace)
