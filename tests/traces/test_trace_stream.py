"""The multi-tenant stream: arrivals, sharing by hand, repeatability, and the published hit ratios."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agentic_kit import agent, conversation, turn, write
from trace_kit import assert_sound

from kvstrata.errors import ConfigError, TraceFormatError
from kvstrata.traces import stream
from kvstrata.traces.trace import Trace
from open_traces import AGENTIC

REAL = AGENTIC


def chains(trace: Trace) -> list[list[int]]:
    return [
        trace.ids[begin:end].tolist() for begin, end in zip(trace.starts, trace.starts[1:], strict=False)
    ]


def shared_blocks(folder: Path, one: dict[str, Any], other: dict[str, Any], **options: Any) -> int:
    """Leading blocks that the first requests of two conversations share."""
    write(folder / "a.json", one)
    write(folder / "b.json.gz", other)
    trace = stream.read(folder, block_tokens=64, **options)
    assert_sound(trace)
    first, second = (chains(trace)[int(np.argmax(trace.session == number))] for number in (0, 1))
    return next((n for n, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), 99)


TURNS = [turn(0, [1, 2, 3, 4, 5])]


@pytest.mark.parametrize(
    ("other", "shared"),
    [
        # 128 tokens of tools and 72 of system prompt: 2 blocks lie in the tools, 3 in both.
        (conversation(TURNS), 3),
        (conversation([turn(0, [11, 12, 13, 14, 15])]), 3),
        (conversation(TURNS, system=73), 2),
        (conversation(TURNS, tool=129, system=71), 0),
        (conversation([turn(0, [1, 2, 3, 4, 5], model="small")]), 0),
    ],
)
def test_what_two_conversations_share(tmp_path: Path, other: dict[str, Any], shared: int) -> None:
    assert shared_blocks(tmp_path, conversation(TURNS), other) == shared


@pytest.mark.parametrize(
    ("tool", "system", "shared"), [(127, 0, 1), (128, 0, 2), (100, 91, 2), (100, 92, 3)]
)
def test_only_whole_blocks_are_shared(tmp_path: Path, tool: int, system: int, shared: int) -> None:
    one = conversation(TURNS, tool=tool, system=system)
    assert shared_blocks(tmp_path, one, one) == shared


def test_agents_share_by_their_own_prompts(tmp_path: Path) -> None:
    first = conversation([turn(0, [1, 2, 3]), agent(5, [turn(0, [7, 8, 9])])])
    other = conversation([turn(0, [1, 2, 3]), agent(7, [turn(0, [4, 5, 6])])], tool=1000)
    write(tmp_path / "a.json", first)
    write(tmp_path / "b.json", other)
    trace = stream.read(tmp_path, block_tokens=64)
    agents = trace.features["agent_depth"] == 1
    one, two = (chain for chain, is_agent in zip(chains(trace), agents, strict=True) if is_agent)
    assert one[:2] == two[:2] and one[2] != two[2]
    assert_sound(trace)


def test_the_arrivals_are_the_ones_of_the_seed(tmp_path: Path) -> None:
    for name in "dbca":
        write(tmp_path / f"{name}.json", conversation([turn(3, [1]), turn(50, [1, 2])], id=name))
    (tmp_path / "NOTICE").write_text("not a conversation")
    trace = stream.read(tmp_path, seed=7, mean_arrival_s=30, block_tokens=64)
    rng = np.random.default_rng(7)
    order = rng.permutation(4)
    starts = np.cumsum(rng.exponential(30, 4))
    expected = np.sort(np.concatenate([starts + 3, starts + 50]))
    assert trace.time_s == pytest.approx(expected - expected[0])
    assert len(order) == 4
    assert trace.session.tolist() == trace.tenant.tolist()
    assert sorted(np.bincount(trace.session).tolist()) == [2, 2, 2, 2]
    assert trace.head.source_format == "stream" and "seed 7" in trace.head.name


def test_the_order_is_a_permutation_of_the_names(tmp_path: Path) -> None:
    for number in range(6):
        name = f"{number}.json"
        write(tmp_path / name, conversation([turn(0, [1])], **{"in": number}))
        write(tmp_path / name, conversation([turn(0, [1], **{"in": 1000 + number})]))
    trace = stream.read(tmp_path, seed=3, block_tokens=64)
    assert (trace.features["input_tokens"] - 1000).tolist() == np.random.default_rng(3).permutation(
        6
    ).tolist()


def test_repeatable_and_another_seed_is_another_stream(tmp_path: Path) -> None:
    for number in range(8):
        write(
            tmp_path / f"{number}.json", conversation([turn(0, [1, 2]), turn(40.0 + number, [1, 2, 3, 4])])
        )
    one, again, other = (stream.read(tmp_path, seed=seed, block_tokens=64) for seed in (1, 1, 2))
    assert one.head == again.head
    for name in ("starts", "ids", "parent", "depth", "size", "time_s", "session", "tenant"):
        assert (getattr(one, name) == getattr(again, name)).all()
    assert one.time_s.tolist() != other.time_s.tolist()


def test_broken_requests_are_counted_over_all_files(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.json", conversation([turn(0, [1]), 5]))
    with pytest.raises(TraceFormatError, match=r"\w\.json, request 2: "):
        stream.read(tmp_path)
    assert stream.read(tmp_path, skip_bad=True).head.skipped == 2


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.json", conversation([turn(0, [1])]))
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(TraceFormatError, match=r"b\.json: no JSON"):
        stream.read(tmp_path, skip_bad=True)


def test_parameters_that_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(TraceFormatError, match="no agentic conversations"):
        stream.read(tmp_path)
    write(tmp_path / "a.json", conversation([turn(0, [1])]))
    for options in (
        {"seed": -1},
        {"mean_arrival_s": -1.0},
        {"mean_arrival_s": float("nan")},
        {"block_tokens": 96},
    ):
        with pytest.raises(ConfigError):
            stream.read(tmp_path, **options)  # type: ignore[arg-type]


def lru_hits(trace: Trace, capacity: int) -> int:
    """Block hits of a plain LRU that touches every request leaf first."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for chain in chains(trace):
        for block in reversed(chain):
            if block in cache:
                hits += 1
                cache.move_to_end(block)
            else:
                if len(cache) >= capacity:
                    cache.popitem(last=False)
                cache[block] = None
    return hits


@pytest.fixture(scope="module")
def real() -> Trace:
    if not REAL.exists():
        pytest.skip(f"the traces are not there: {Path(*REAL.parts[-4:])} beside the repository")
    return stream.read(REAL)


def test_the_sixty_conversations(real: Trace) -> None:
    assert (real.head.requests, real.head.accesses, real.head.unique) == (4_043, 1_864_385, 70_161)
    assert (real.head.block_tokens, real.head.block_bytes) == (256, 32 * 2**20)
    assert len(np.unique(real.session)) == 60
    assert_sound(real)


def test_the_published_hit_ratios(real: Trace) -> None:
    """DESIGN.md section 6, LRU; the text leaves room for a difference of 0.002 at 1 % of the blocks."""
    accesses = real.head.accesses
    assert 1 - real.head.unique / accesses == pytest.approx(0.962, abs=0.0005)
    for share, expected in ((0.001, 0.000), (0.01, 0.151), (0.05, 0.838), (0.1, 0.933), (0.4, 0.961)):
        ratio = lru_hits(real, int(share * real.head.unique)) / accesses
        assert ratio == pytest.approx(expected, abs=0.002), share
