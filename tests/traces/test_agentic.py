"""One agentic conversation: fields, nested sub-agents, coarser blocks, broken requests and files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from agentic_kit import agent, conversation, turn, write
from trace_kit import assert_sound

from kvstrata.errors import ConfigError, TraceFormatError
from kvstrata.traces import agentic
from open_traces import AGENTIC

REAL = AGENTIC / "trace_0295.json.gz"


@pytest.mark.parametrize("name", ["c.json", "c.json.gz"])
def test_every_field(tmp_path: Path, name: str) -> None:
    requests = [
        turn(0, [1, 2, 3]),
        agent(2, [turn(0.5, [8, 9], model="small", api_time=None), turn(30, [8, 9, 10], model="small")]),
        turn(10, [1, 2, 3, 4], stop="end_turn"),
    ]
    trace = agentic.read(write(tmp_path / name, conversation(requests)), bytes_per_token=2)
    assert (trace.head.source_format, trace.head.block_tokens, trace.head.block_bytes) == (
        "agentic",
        64,
        128,
    )
    assert trace.time_s.tolist() == [0, 2.5, 10, 32]
    assert trace.ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 3, 4, 6]
    assert trace.features["agent_depth"].tolist() == [0, 1, 0, 1]
    assert trace.features["input_tokens"].tolist() == [197, 133, 261, 197]
    assert trace.features["output_tokens"].tolist() == [9] * 4
    assert trace.features["duration_ms"].tolist() == [1500, -1, 1500, 1500]
    assert trace.head.labels["model"] == ("big", "small")
    assert trace.features["model"].tolist() == [0, 1, 0, 1]
    assert trace.head.labels["stop"] == ("tool_use", "end_turn")
    assert trace.features["stop"].tolist() == [0, 0, 1, 0]
    assert trace.session.tolist() == trace.tenant.tolist() == [0] * 4
    assert_sound(trace)


def test_ids_are_local_to_the_model(tmp_path: Path) -> None:
    path = write(tmp_path / "c.json", conversation([turn(0, [1, 2]), turn(1, [1, 2], model="small")], 0, 0))
    assert agentic.read(path).ids.tolist() == [0, 1, 2, 3]


def test_a_coarse_block_has_the_id_of_its_last_fine_one(tmp_path: Path) -> None:
    """[1 2][3 4] 5 and [1 2][3 6]: the second coarse blocks differ, incomplete ones are dropped."""
    path = write(
        tmp_path / "c.json", conversation([turn(0, [1, 2, 3, 4, 5]), turn(1, [1, 2, 3, 6]), turn(2, [1])])
    )
    trace = agentic.read(path, block_tokens=128)
    assert trace.head.block_tokens == 128
    assert np.diff(trace.starts).tolist() == [2, 2, 0]
    assert trace.ids.tolist() == [0, 1, 0, 2]
    assert_sound(trace)


def test_an_id_under_two_parents_stays_a_tree(tmp_path: Path) -> None:
    """Such a file is wrong; the trace keeps one parent per block all the same."""
    path = write(tmp_path / "c.json", conversation([turn(0, [1, 2, 3]), turn(1, [7, 2, 3])], 0, 0))
    trace = agentic.read(path)
    assert trace.ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert_sound(trace)


@pytest.mark.parametrize("tokens", [0, 63, 100, -64])
def test_blocks_that_64_tokens_do_not_make(tmp_path: Path, tokens: int) -> None:
    with pytest.raises(ConfigError, match="multiple of 64"):
        agentic.read(write(tmp_path / "c.json", conversation([turn(0, [1])])), block_tokens=tokens)


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (7, "where a JSON object belongs"),
        ({**turn(0, [1]), "t": "x"}, "t is 'x'"),
        (turn(0, [1, 1]), "a block twice"),
        (turn(0, [1], model=5), "model is 5, not a string"),
        (turn(0, [1], out=-5), "out is -5"),
        ({"t": 1, "type": "n"}, "no hash_ids"),
        ({"t": 1, "type": "subagent"}, "no requests"),
        (agent(1, [], tool=-1), "tool_tokens is -1"),
    ],
)
def test_a_broken_request_has_its_number(tmp_path: Path, request_: object, why: str) -> None:
    requests = [turn(0, [1]), agent(1, [turn(0, [5]), request_]), turn(3, [1, 2])]
    path = write(tmp_path / "c.json.gz", conversation(requests))
    with pytest.raises(TraceFormatError) as error:
        agentic.read(path)
    assert f"{path}, request 4: " in str(error.value) and why in str(error.value)
    trace = agentic.read(path, skip_bad=True)
    assert (trace.head.requests, trace.head.skipped) == (3, 1)


def test_agents_in_agents_end(tmp_path: Path) -> None:
    nested = turn(0, [1])
    for _ in range(40):
        nested = agent(0, [nested])
    path = write(tmp_path / "c.json", conversation([turn(0, [2]), nested]))
    with pytest.raises(TraceFormatError, match="nested deeper than 16"):
        agentic.read(path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no JSON"),
        (b'{"requests": [', "no JSON"),
        (b"[1]", "where a JSON object belongs"),
        (b'{"block_size": 64}', "no requests"),
        (b'{"block_size": 16, "requests": []}', "blocks of 16 tokens"),
        (b'{"requests": [], "tool_tokens": "x"}', "tool_tokens is 'x'"),
        (b'{"requests": []}', "no requests"),
        (gzip.compress(b'{"requests": []}', mtime=0)[:-4], "cut off"),
    ],
)
@pytest.mark.parametrize("skip_bad", [False, True])
def test_what_is_no_conversation(tmp_path: Path, content: bytes, why: str, skip_bad: bool) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(content)
    with pytest.raises(TraceFormatError, match=why) as error:
        agentic.read(path, skip_bad=skip_bad)
    assert "c.json" in str(error.value)


def test_a_real_conversation_with_agents() -> None:
    if not REAL.exists():
        pytest.skip(f"the trace is not there: {Path(*REAL.parts[-5:])} beside the repository")
    trace = agentic.read(REAL)
    assert trace.head.requests == 416
    assert int((trace.features["agent_depth"] == 1).sum()) == 92
    assert (trace.features["input_tokens"] // 64 == np.diff(trace.starts)).all()
    assert_sound(trace)
