"""Mooncake traces: JSON lines of {timestamp, input_length, output_length, hash_ids}.

An id is a prefix hash, so equal ids are equal prefixes in the whole file. The last block of a request may
be partial and is charged as a whole one, or left out (engines cache full blocks only). The file knows no
sessions, tenants or models.
"""

from __future__ import annotations

from pathlib import Path

from kvstrata.errors import TraceFormatError
from kvstrata.traces.builder import TraceBuilder
from kvstrata.traces.fields import block_ids, count, number, parse_json, parse_record
from kvstrata.traces.text import BadRecords, lines
from kvstrata.traces.trace import DEFAULT_BYTES_PER_TOKEN, Trace

FORMAT = "mooncake"
BLOCK_TOKENS = 512


def recognise(path: Path, first: bytes) -> bool:
    """Whether the first line is a Mooncake record. first: up to 64 KiB of the (unpacked) content."""
    line = first.lstrip().split(b"\n", 1)[0]
    return line.startswith(b"{") and b'"timestamp"' in line and b'"hash_ids"' in line


def read(
    path: Path | str,
    *,
    block_tokens: int = BLOCK_TOKENS,
    block_bytes: int | None = None,
    bytes_per_token: int = DEFAULT_BYTES_PER_TOKEN,
    full_blocks: bool = False,
    skip_bad: bool = False,
) -> Trace:
    """The trace in a Mooncake file.

    block_tokens: tokens of a block; the format has 512 and does not say so. block_bytes: size of every
    block; None is block_tokens x bytes_per_token. full_blocks: leave out the last block of a request
    where the input does not fill it.

    Raises TraceFormatError, naming file and line, for a record that cannot be read (skip_bad passes over
    those), and where most requests do not have the number of ids that block_tokens makes.
    """
    path = Path(path)
    bad = BadRecords(skip_bad)
    builder = TraceBuilder(path.name, FORMAT, block_tokens, block_bytes or block_tokens * bytes_per_token)
    other_lengths = 0
    for line, text in lines(path):
        if not text.strip():
            continue
        try:
            record = parse_record(parse_json(text))
            time_s = number(record, "timestamp") / 1000
            ids = block_ids(record, "hash_ids")
            input_tokens, output_tokens = count(record, "input_length"), count(record, "output_length")
        except ValueError as why:
            bad.bad(path, line, str(why))
            continue
        if input_tokens is not None and abs(len(ids) * block_tokens - input_tokens) >= block_tokens:
            other_lengths += 1
        if full_blocks and input_tokens is not None:
            ids = ids[: input_tokens // block_tokens]
        builder.add(time_s, ids, input_tokens=input_tokens, output_tokens=output_tokens)
    if other_lengths * 2 > builder.requests:
        raise TraceFormatError(
            f"{path}: {other_lengths} of {builder.requests} requests have another number of hash_ids than "
            f"their input_length in blocks of {block_tokens} tokens; give the block size of this trace "
            "with --block-tokens"
        )
    return builder.build(bad.count)
