"""Agentic conversations: one JSON file each, of requests in 64-token blocks, with sub-agents nested in it.

Ids are local to (conversation, model); the incomplete block at the end of a prompt has none. Which blocks
of different conversations are the same is decided here too (`PrefixTree`); when the conversations happen
is `kvstrata.traces.stream`'s matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.errors import ConfigError, TraceFormatError
from kvstrata.traces.builder import TraceBuilder
from kvstrata.traces.fields import (
    Record,
    block_ids,
    count,
    items,
    label,
    number,
    parse_json,
    parse_record,
)
from kvstrata.traces.text import BadRecords, open_bytes
from kvstrata.traces.trace import DEFAULT_BYTES_PER_TOKEN, Trace

FORMAT = "agentic"
BLOCK_TOKENS = 64
MAX_FILE_BYTES = 1 << 30
MAX_AGENT_DEPTH = 16


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a conversation.

    time_s: from the start of the conversation. tool_tokens, system_tokens: how much of the prompt's start
    are tool definitions and then the system prompt. ids: one per complete block, root first.
    agent_depth: 0 for the conversation itself, 1 for its sub-agents. Unknown values are None.
    """

    time_s: float
    model: str
    tool_tokens: int
    system_tokens: int
    ids: NDArray[np.int64] | NDArray[np.uint64]
    agent_depth: int
    input_tokens: int | None
    output_tokens: int | None
    stop: str | None
    duration_ms: int | None


def recognise(path: Path, first: bytes) -> bool:
    """Whether it is a conversation's JSON object. first: up to 64 KiB of the (unpacked) content."""
    return (
        first.lstrip().startswith(b"{")
        and b'"requests"' in first
        and (b'"hash_id_scope"' in first or b'"tool_tokens"' in first)
    )


def coarsening(block_tokens: int) -> int:
    """How many 64-token blocks make one of block_tokens. Raises ConfigError unless it is a whole number."""
    if block_tokens < BLOCK_TOKENS or block_tokens % BLOCK_TOKENS:
        raise ConfigError(
            f"agentic traces have blocks of {BLOCK_TOKENS} tokens, which make no blocks of {block_tokens}; "
            f"take a multiple of {BLOCK_TOKENS}"
        )
    return block_tokens // BLOCK_TOKENS


def read_turns(path: Path, bad: BadRecords, block_tokens: int = BLOCK_TOKENS) -> Iterator[Turn]:
    """The requests of one conversation in the order of the file, sub-agents' where they were started.

    block_tokens: a multiple of 64; a coarse block takes the id of its last 64-token block, which names the
    whole prefix. Raises TraceFormatError for what is no such file; broken requests go to `bad`.
    """
    every = coarsening(block_tokens)
    with open_bytes(path) as file:
        text = file.read(MAX_FILE_BYTES + 1)
    if len(text) > MAX_FILE_BYTES:
        raise TraceFormatError(f"{path}: larger than {MAX_FILE_BYTES} bytes; one conversation is one file")
    try:
        conversation = parse_record(parse_json(text))
        requests = items(conversation, "requests")
        fine_tokens = count(conversation, "block_size")
    except ValueError as why:
        raise TraceFormatError(f"{path}: {why}; an agentic trace is one JSON object") from why
    if fine_tokens not in (None, BLOCK_TOKENS):
        raise TraceFormatError(f"{path}: blocks of {fine_tokens} tokens; {BLOCK_TOKENS} are known")
    walk = _Walk(path, bad, every)
    yield from walk.turns(requests, walk.prompt_start(conversation, 0), 0.0, 0)


class _Walk:
    """One pass through the requests of a file, numbered from 1 as they come, sub-agent entries too."""

    def __init__(self, path: Path, bad: BadRecords, every: int) -> None:
        self._path = path
        self._bad = bad
        self._every = every
        self._number = 0

    def turns(
        self, requests: list[Any], prompt_start: tuple[int, int], base_s: float, depth: int
    ) -> Iterator[Turn]:
        for entry in requests:
            self._number += 1
            nested: list[Any] | None = None
            turn: Turn | None = None
            try:
                record = parse_record(entry)
                time_s = base_s + number(record, "t")
                if record.get("type") == "subagent":
                    if depth == MAX_AGENT_DEPTH:
                        raise ValueError(f"sub-agents nested deeper than {MAX_AGENT_DEPTH}")
                    nested = items(record, "requests")
                    own_start = self.prompt_start(record, self._number)
                else:
                    turn = self._turn(record, prompt_start, time_s, depth)
            except ValueError as why:
                self._bad.bad(self._path, self._number, str(why), unit="request")
                continue
            if nested is not None:
                yield from self.turns(nested, own_start, time_s, depth + 1)
            elif turn is not None:
                yield turn

    def prompt_start(self, record: Record, request: int) -> tuple[int, int]:
        """tool_tokens and system_tokens of a conversation or sub-agent, 0 where they are not known."""
        try:
            return count(record, "tool_tokens") or 0, count(record, "system_tokens") or 0
        except ValueError as why:
            if request:
                raise
            raise TraceFormatError(f"{self._path}: {why}") from why

    def _turn(self, record: Record, prompt_start: tuple[int, int], time_s: float, depth: int) -> Turn:
        seconds = number(record, "api_time") if record.get("api_time") is not None else None
        return Turn(
            time_s=time_s,
            model=label(record, "model") or "",
            tool_tokens=prompt_start[0],
            system_tokens=prompt_start[1],
            ids=block_ids(record, "hash_ids")[self._every - 1 :: self._every].copy(),
            agent_depth=depth,
            input_tokens=count(record, "in"),
            output_tokens=count(record, "out"),
            stop=label(record, "stop"),
            duration_ms=None if seconds is None else max(0, round(seconds * 1000)),
        )


class PrefixTree:
    """One number per block of many conversations, equal where conversations share the block.

    A block is shared if all of it lies in the tool definitions and another conversation has the same model
    and tool_tokens, or in tool definitions and system prompt and system_tokens are the same too. The traces
    hold no text, so equal lengths stand for equal content. Every other block belongs to its conversation.

    Each number has one parent, whatever the files say: a number stands for (parent, what follows it).
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._shared: dict[tuple[object, ...], int] = {}
        self._own: dict[str, dict[tuple[int, int], int]] = {}
        self._blocks = 0

    def begin_conversation(self) -> None:
        """Ids given from now on belong to another conversation."""
        self._own = {}

    def number(self, turn: Turn) -> NDArray[np.int64]:
        """The number of each of the turn's blocks, root first."""
        tool_blocks = turn.tool_tokens // self._block_tokens
        prompt_blocks = (turn.tool_tokens + turn.system_tokens) // self._block_tokens
        own = self._own.setdefault(turn.model, {})
        chain: list[int] = []
        parent = -1
        for depth, local in enumerate(turn.ids.tolist()):
            block = own.get((parent, local))
            if block is None:
                if depth < prompt_blocks:
                    system = None if depth < tool_blocks else turn.system_tokens
                    block = self._share((parent, turn.model, turn.tool_tokens, system))
                else:
                    block = self._new()
                own[parent, local] = block
            chain.append(block)
            parent = block
        return np.array(chain, np.int64)

    def _share(self, place: tuple[object, ...]) -> int:
        block = self._shared.get(place)
        if block is None:
            block = self._shared[place] = self._new()
        return block

    def _new(self) -> int:
        self._blocks += 1
        return self._blocks - 1


def add_conversation(
    builder: TraceBuilder, tree: PrefixTree, turns: Iterator[Turn], name: str, start_s: float
) -> None:
    """The requests of one conversation, which is session and tenant of all of them, from start_s on."""
    tree.begin_conversation()
    for turn in turns:
        builder.add(
            start_s + turn.time_s,
            tree.number(turn),
            session=name,
            tenant=name,
            input_tokens=turn.input_tokens,
            output_tokens=turn.output_tokens,
            agent_depth=turn.agent_depth,
            duration_ms=turn.duration_ms,
            model=turn.model,
            stop=turn.stop,
        )


def read(
    path: Path | str,
    *,
    block_tokens: int = BLOCK_TOKENS,
    block_bytes: int | None = None,
    bytes_per_token: int = DEFAULT_BYTES_PER_TOKEN,
    skip_bad: bool = False,
) -> Trace:
    """One conversation alone.

    block_tokens: a multiple of 64. block_bytes: of every block; None is block_tokens x bytes_per_token.

    Raises TraceFormatError naming the file, and the request where it is one that cannot be read (skip_bad
    passes over those); ConfigError for other block_tokens.
    """
    path = Path(path)
    bad = BadRecords(skip_bad)
    coarsening(block_tokens)
    builder = TraceBuilder(path.name, FORMAT, block_tokens, block_bytes or block_tokens * bytes_per_token)
    turns = read_turns(path, bad, block_tokens)
    add_conversation(builder, PrefixTree(block_tokens), turns, path.name, 0.0)
    return builder.build(bad.count)
