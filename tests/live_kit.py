"""A real store fed with a trace as an engine would feed it, and real traces to feed it with.

Live is everything: look up, load what matches and verify every byte, save the chain, with real threads,
slots, checksums and write-back. What is simulated beside it is the business of the tests.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from kvstrata.config import Config, MemoryTierConfig, NvmeTierConfig
from kvstrata.hashing import namespace_digest, wrap_keys
from kvstrata.store import BlockStore
from kvstrata.types import BlockKey, BlockLayout, Lookup, Namespace, Outcome, PrefixMatch
from store_kit import store_config

SAMPLE = Path(__file__).parent / "data" / "mooncake_conversation_300.jsonl"

BLOCK_BYTES = 512
SLOT_BYTES = 4096
LONGEST_CHAIN = 2_048
FIELDS = {"model": "trace replay"}
DIGEST = namespace_digest(FIELDS)

Chains = list[list[int]]
"""The blocks of every request, root first."""


def read_chains(path: Path) -> Chains:
    """hash_ids of every request of a Mooncake trace; skips the test where it is not there."""
    if not path.exists():
        pytest.skip(f"the whole trace is not there: {Path(*path.parts[-5:])} beside the repository")
    data = path.read_bytes()
    text = gzip.decompress(data) if path.suffix == ".gz" else data
    return [json.loads(line)["hash_ids"] for line in text.splitlines()]


@dataclass(frozen=True)
class Hits:
    """Per request: leading hits, and hits anywhere."""

    prefix: list[int]
    blocks: list[int]

    @staticmethod
    def of(flags: Sequence[Sequence[bool]]) -> Hits:
        return Hits([(*row, False).index(False) for row in flags], [sum(row) for row in flags])


def payload(block: int) -> bytes:
    """Other bytes for every block, so that a mix-up shows."""
    return hashlib.blake2b(block.to_bytes(8, "little")).digest() * (BLOCK_BYTES // 64)


def open_store(*tiers: MemoryTierConfig | NvmeTierConfig) -> BlockStore:
    settings = store_config(
        io_threads=2, io_store_threads=1, batch_blocks=LONGEST_CHAIN, io_deadline_seconds=60
    )
    return BlockStore(Config(settings, tiers), BlockLayout(BLOCK_BYTES, 512), Namespace(DIGEST, FIELDS))


class LiveReplay:
    """Feeds a store with a trace, request after request.

    sources: what a save brings bytes for: the "whole" chain, or what had to be "computed" because no tier
    served it. in_turn: load block by block, the first tier's blocks before others, so that what is
    promoted does not depend on which thread is faster.
    """

    def __init__(
        self,
        store: BlockStore,
        *,
        sources: Literal["whole", "computed"] = "whole",
        in_turn: bool = False,
    ) -> None:
        self.store = store
        self.sources = sources
        self.in_turn = in_turn
        self.keys: dict[int, BlockKey] = {}
        self.payloads: dict[int, bytes] = {}
        self.target = memoryview(bytearray(LONGEST_CHAIN * BLOCK_BYTES))
        self.loaded = 0
        self.first_tiers: list[list[int]] = []
        """Per request and block, the first tier that had it at the lookup; the number of tiers for none."""

    def chain_keys(self, chain: list[int]) -> list[BlockKey]:
        new = [block for block in chain if block not in self.keys]
        for block, key in zip(new, wrap_keys(DIGEST, [b.to_bytes(8, "big") for b in new]), strict=True):
            self.keys[block] = key
            self.payloads[block] = payload(block)
        return [self.keys[block] for block in chain]

    def load(self, match: PrefixMatch, positions: Sequence[int]) -> None:
        """Load blocks of a match into their places in the target."""
        places = [self.target[n * BLOCK_BYTES : (n + 1) * BLOCK_BYTES] for n in positions]
        keys = tuple(match.keys[n] for n in positions)
        part = PrefixMatch(keys, len(keys), tuple(match.states[n] for n in positions))
        transfer = self.store.load(part, places)
        assert transfer.wait(30) and transfer.wait_released(30)
        assert transfer.outcomes == [Outcome.LOADED] * len(keys)
        self.loaded += len(keys)

    def request(self, chain: list[int]) -> list[bool]:
        keys = self.chain_keys(chain)
        self.first_tiers.append(self._first_tiers(keys))
        match = self.store.lookup(keys)
        assert Lookup.PENDING not in match.states
        hits = range(match.blocks)
        if self.in_turn:
            for position in sorted(hits, key=lambda n: self.first_tiers[-1][n] > 0):
                self.load(match, [position])
        elif hits:
            self.load(match, hits)
        expected = b"".join(self.payloads[block] for block in chain[: match.blocks])
        assert self.target[: len(expected)] == expected, "wrong bytes were served"
        served = match.blocks if self.sources == "computed" else 0
        sources = [None if n < served else self.payloads[block] for n, block in enumerate(chain)]
        assert self.store.save(keys, sources).wait(30)
        # An engine would not wait for the rest; here the order of events must be that of the trace.
        assert self.store.flush(30)
        return [state is Lookup.HIT for state in match.states]

    def _first_tiers(self, keys: list[BlockKey]) -> list[int]:
        rows = [tier.table.lookup(keys) for tier in self.store.tiers]
        return [[*states, Lookup.HIT].index(Lookup.HIT) for states in zip(*rows, strict=True)]

    def run(self, trace: Chains) -> list[list[bool]]:
        return [self.request(chain) for chain in trace]
