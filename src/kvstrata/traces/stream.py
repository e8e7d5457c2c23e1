"""A multi-tenant stream: conversations recorded one by one, as if many users had started them over time.

Conversations arrive as a Poisson process; within one, the recorded gaps stay. Each is a session and a
tenant of its own. Repeatable: the same files, seed and mean arrival give the same stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvstrata.errors import ConfigError, TraceFormatError
from kvstrata.traces.agentic import PrefixTree, add_conversation, coarsening, read_turns
from kvstrata.traces.builder import TraceBuilder
from kvstrata.traces.text import BadRecords
from kvstrata.traces.trace import DEFAULT_BYTES_PER_TOKEN, Trace

FORMAT = "stream"
BLOCK_TOKENS = 256
MEAN_ARRIVAL_S = 120.0
SUFFIXES = (".json", ".json.gz", ".json.zst")


def conversation_files(folder: Path | str) -> list[Path]:
    """The conversations of a folder, by name. Raises TraceFormatError if there are none."""
    folder = Path(folder)
    files = sorted(
        (file for file in folder.iterdir() if file.name.endswith(SUFFIXES) and file.is_file()),
        key=lambda file: file.name,
    )
    if not files:
        raise TraceFormatError(f"{folder}: no agentic conversations ({', '.join(SUFFIXES)}) in this folder")
    return files


def read(
    folder: Path | str,
    *,
    seed: int = 1,
    mean_arrival_s: float = MEAN_ARRIVAL_S,
    block_tokens: int = BLOCK_TOKENS,
    block_bytes: int | None = None,
    bytes_per_token: int = DEFAULT_BYTES_PER_TOKEN,
    skip_bad: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """The stream of a folder of agentic conversations.

    seed: of the order and the arrivals. mean_arrival_s: mean seconds between two conversations' starts.
    block_tokens: a multiple of 64. block_bytes: of every block; None is block_tokens x bytes_per_token.
    progress: called with (conversations read, conversations).

    Raises TraceFormatError as `agentic.read` does and for an empty folder; ConfigError for a parameter that
    cannot work.
    """
    if seed < 0:
        raise ConfigError(f"the seed is {seed}; take a number from 0")
    if not (math.isfinite(mean_arrival_s) and mean_arrival_s >= 0):
        raise ConfigError(f"the mean arrival is {mean_arrival_s} seconds; take a number from 0")
    coarsening(block_tokens)
    folder = Path(folder)
    files = conversation_files(folder)
    bad = BadRecords(skip_bad)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(files))
    starts_s = np.cumsum(rng.exponential(mean_arrival_s, len(files)))
    name = f"{folder.resolve().name}, seed {seed}"
    builder = TraceBuilder(name, FORMAT, block_tokens, block_bytes or block_tokens * bytes_per_token)
    tree = PrefixTree(block_tokens)
    for done, (index, start_s) in enumerate(zip(order.tolist(), starts_s.tolist(), strict=True), start=1):
        file = files[index]
        add_conversation(builder, tree, read_turns(file, bad, block_tokens), file.name, start_s)
        if progress is not None:
            progress(done, len(files))
    return builder.build(bad.count)
