"""A real trace through the live store and through the bare policy kernel: the same hits, per request.

Live is the whole store, see `live_kit`. Simulated is one policy call per request on integer ids.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from kvstrata.config import MemoryTierConfig, NvmeTierConfig
from kvstrata.policies import POLICIES, Policy, make_policy
from kvstrata.types import BlockKey
from live_kit import SAMPLE, SLOT_BYTES, Chains, Hits, LiveReplay, open_store, read_chains
from open_traces import CONVERSATION


@pytest.fixture(scope="module")
def sample() -> Chains:
    return read_chains(SAMPLE)


@pytest.fixture(scope="module")
def whole() -> Chains:
    return read_chains(CONVERSATION)


def simulate(
    trace: Chains, policy_name: str, blocks: int, keys: Mapping[int, BlockKey] | None = None
) -> list[list[bool]]:
    """One kernel call per request; sizes are blocks. A hit is what a lookup before the call finds.

    keys: of every block, for policies that know blocks by more than their id.
    """
    ids = 1 + max(max(chain) for chain in trace)
    policy = make_policy(policy_name, ids, blocks)
    if len(policy.digest) and keys:
        for index, key in keys.items():
            policy.digest[index] = int.from_bytes(key[:8], "little")
    sizes, pins = np.ones(ids, np.int64), np.zeros(ids, np.int32)
    flags = []
    for request, chain in enumerate(trace, start=1):
        indices = np.array(chain, np.int32)
        flags.append((policy.where[indices] > 0).tolist())
        policy.access(indices, np.ones(len(chain), np.bool_), sizes, pins, request)
        assert policy.used <= blocks
    assert_replay_agrees(trace, policy, blocks)
    return flags


def assert_replay_agrees(trace: Chains, policy: Policy, blocks: int) -> None:
    """The simulator's way, all requests in one call, ends with the same blocks in the same order."""
    whole = make_policy(policy.name, policy.max_ids, blocks)
    whole.digest[:] = policy.digest
    starts = np.cumsum([0, *map(len, trace)]).astype(np.int64)
    whole.replay(np.concatenate(trace).astype(np.int32), starts, np.ones(policy.max_ids, np.int64))
    assert whole.order().tolist() == policy.order().tolist()


def assert_live_equals_simulated(trace: Chains, policy: str, blocks: int) -> Hits:
    memory = MemoryTierConfig(capacity_bytes=blocks * SLOT_BYTES, policy=policy)  # type: ignore[arg-type]
    with open_store(memory) as store:
        replay = LiveReplay(store)
        live = replay.run(trace)
        assert store.tiers[0].table.slots == blocks
        assert store.tiers[0].table.pinned_blocks() == 0
        store.check_integrity()
        hits = Hits.of(live)
        assert replay.loaded == sum(hits.prefix)
        told = store.telemetry.value("lookup_blocks_total", "hit")
    simulated = simulate(trace, policy, blocks, replay.keys)
    first = next((n for n, pair in enumerate(zip(live, simulated, strict=True)) if pair[0] != pair[1]), -1)
    assert first == -1, f"request {first}: live {live[first]}, simulated {simulated[first]}"
    assert told == sum(hits.blocks)
    return hits


@pytest.mark.parametrize("blocks", [400, 3_000])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_sample_through_memory(sample: Chains, policy: str, blocks: int) -> None:
    hits = assert_live_equals_simulated(sample, policy, blocks)
    assert sum(hits.prefix) > 0
    if policy == "lru":
        assert hits.prefix == hits.blocks


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_sample_through_memory_and_nvme(sample: Chains, policy: str, tmp_path: Path) -> None:
    """Two tiers, each with a policy of its own; a block counts as a hit where any tier has it.

    Without promotion, which tells the memory tier's policy of a load in the order in which threads end.
    """
    in_memory = 400
    memory = MemoryTierConfig(
        capacity_bytes=in_memory * SLOT_BYTES, policy=policy, promote=False  # type: ignore[arg-type]
    )  # fmt: skip
    nvme = NvmeTierConfig(
        path=str(tmp_path / "nvme"), capacity_bytes=25 * 2**20, policy=policy  # type: ignore[arg-type]
    )  # fmt: skip
    with open_store(memory, nvme) as store:
        on_nvme = store.tiers[1].table.slots
        replay = LiveReplay(store)
        live = replay.run(sample)
        store.check_integrity()
        served = store.telemetry.value("blocks_total", "load", "nvme", "loaded")
    assert 2_900 < on_nvme < 3_200
    upper, lower = (simulate(sample, policy, blocks, replay.keys) for blocks in (in_memory, on_nvme))
    either = [[a or b for a, b in zip(*rows, strict=True)] for rows in zip(upper, lower, strict=True)]
    assert live == either
    assert served > 0


REQUESTS = int(os.environ.get("KVSTRATA_LIVE_REQUESTS", "4200"))
"""Real requests per policy: 50,400 over all twelve. 50,000 for each take half an hour."""


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_real_requests_through_memory(whole: Chains, policy: str) -> None:
    """The conversation trace, at one capacity after another until there were enough requests."""
    blocks_of_all = len({block for chain in whole for block in chain})
    assert (len(whole), sum(map(len, whole)), blocks_of_all) == (12_031, 288_500, 182_790)
    done = 0
    for share in itertools.cycle([0.01, 0.1, 0.001, 0.2, 0.05]):
        requests = whole[: REQUESTS - done]
        hits = assert_live_equals_simulated(requests, policy, int(share * blocks_of_all))
        assert sum(hits.blocks) > 0
        if policy == "lru":
            assert hits.prefix == hits.blocks
        done += len(requests)
        if done == REQUESTS:
            break
