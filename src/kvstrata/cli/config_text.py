"""The text of a configuration file: every key of `kvstrata.config` with its value and what it means.

Keys and defaults come from the dataclasses; only the words are here. A key without words is a KeyError.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kvstrata.config import Config, MediumFields, MemoryTierConfig, TierConfig, is_size

WORDS: dict[str, dict[str, str]] = {
    "memory": {
        "capacity_bytes": "bound of this tier; all of it is taken from the system, see touch",
        "policy": "who leaves when it is full",
        "policy_options": "parameters of the policy that differ from their defaults",
        "ttl_seconds": "blocks older than this are misses; 0: no limit",
        "verify": "check the checksum on every read from memory",
        "promote": "copy a block that was read from the tier below into memory",
        "touch": "take the memory from the system ahead of its first use",
        "numa": 'nodes that it lies on: "auto", "interleave", "off", or a node such as "0"',
        "pin": "register it with the CUDA driver, if there is one",
    },
    "tier": {
        "write_mode": "it gets saves: later, before they are done, when the tier above drops one, never",
        "deadline_seconds": "a load asks the tiers below after so long; 0: the store's time for all of it",
        "breaker_failures": "errors in a row that take it out of service; 0: as the store says",
        "breaker_retry_seconds": "after so long it is tried again; 0: as the store says",
        "demote_bytes": 'room kept in the tier above for blocks on their way here, with "on_evict"',
        "attach": "keep what is read from below: a read cache",
        "attach_reads": 'from so many reads on, with "second"',
        "attach_ghosts": "blocks whose reads are remembered for that",
        "attach_namespaces": "only of these, by the beginning of their digests; empty: of all",
        "attach_min_bytes": "only blocks of this size at least",
        "attach_max_bytes": "and of this size at most; 0: no bound",
        "attach_bytes_per_second": "budget of writes for it; 0: none",
        "attach_bytes_per_day": "the same by the day, for a disk that wears out; 0: none",
        "attach_chunk": "only blocks that are asked for, or all that lie with them below",
        "attach_staging_bytes": "memory for blocks that wait to be written here",
        "read_ahead_blocks": "so many that follow in the chain are fetched in the background",
    },
    "nvme": {
        "path": "folder of this tier, for one process; on a local NVMe disk",
        "capacity_bytes": "bound of the whole folder on disk, with everything the tier writes",
        "policy": "who leaves when it is full",
        "policy_options": "parameters of the policy that differ from their defaults",
        "ttl_seconds": "blocks older than this are misses; 0: no limit",
        "segment_bytes": "size of one file; the disk's space is taken file by file, when needed",
        "direct_io": "read and write past the page cache (O_DIRECT) where the file system can",
        "sync": "made to survive a power loss at flush and close, or after every block",
        "prepare": "write new segments through once in the background: the next one, or all",
        "prepare_segments": 'how many to keep ready with "ahead"',
    },
    "shared_fs": {
        "path": "folder on a file system that all members mount",
        "capacity_bytes": "bound of the folder, for all members together; the first one settles it",
        "policy": "who leaves when it is full",
        "policy_options": "parameters of the policy that differ from their defaults",
        "ttl_seconds": "blocks older than this are misses; 0: no limit",
        "extent_bytes": "blocks are packed into files of this size",
        "publish_seconds": "others see a block after so long, also if its file is not full",
        "refresh_seconds": "how often this member looks what others published",
        "lease_seconds": "a member that shows no sign of life for so long counts as dead",
        "access_seconds": "how often this member writes down which blocks it used",
        "access_bytes": "size of each of the two files that it writes that to",
        "open_files": "files that stay open though nobody reads them now",
        "open_threads": "threads that open and close files",
        "direct_io": "read and write past the page cache (O_DIRECT) where the file system can",
        "mover": "what moves the bytes: our I/O engine, or NIXL",
        "burst_bytes": "room that this member keeps ready for a sudden save",
        "live_share": "share of the capacity for live blocks; the rest is room for rewriting",
        "collect": "may this member become the collector",
        "rewrite_bytes_per_second": "how much a collector rewrites at most to get dead bytes out of files",
        "stripe_count": "Lustre: targets per file; -1 for all, 0 leaves the folder's layout alone",
        "stripe_bytes": "Lustre: bytes on one target before the next",
        "dom_bytes": "Lustre: so much of each small file lies on the metadata server; 0: none",
    },
    "store": {
        "io_deadline_seconds": "a load or save that takes longer counts as failed",
        "io_engine": "io_uring where it can be had, or threads that wait",
        "io_depth": "most reads and writes in flight on io_uring; fewer where that is as fast",
        "io_threads": "the same without io_uring: threads that move bytes",
        "io_store_threads": "how many of them may save at a time, so that loads need not wait",
        "queue_bytes": "bound of what waits to be saved",
        "queue_blocks": "the same, in blocks",
        "load_queue_blocks": "bound of what waits to be loaded",
        "batch_blocks": "most blocks in one save",
        "full_queue": "what a save meets at these bounds",
        "throttle_seconds": "longest wait of a throttled save",
        "breaker_failures": "errors in a row that take a tier out of service",
        "breaker_retry_seconds": "after so long it is tried again",
        "staging_bytes": "memory for copies between tiers; as much again for loads with own deadlines",
        "close_seconds": "longest wait for the disk when the store closes",
        "events": "how many past events are remembered",
        "salt": "a tenant's secret: without it nobody can find the tenant's blocks",
        "capture": "folder for a trace of what is asked of the store; empty: none is recorded",
        "capture_bytes": "bound of that folder; the oldest files go",
        "capture_queue_bytes": "bound of the memory in which records wait to be written",
        "capture_seconds": "a file is written after so long; a kill loses as much",
    },
    "metrics": {
        "host": "address to listen on",
        "port": "port for Prometheus and `kvstrata stats`; 0: none",
    },
    "serve": {
        "socket": "where `kvstrata serve` listens; only that command looks at it",
        "connect": "socket of a `kvstrata serve`: its tiers are used, and those of this file are not",
        "max_clients": "processes that may be connected at a time",
        "client_bytes": "what the loads and saves of one of them may move at a time",
        "client_transfers": "how many loads and saves of one of them may run at a time",
        "client_regions": "how many ranges of memory one of them may register",
        "other_users": "serve processes of other users too",
        "huge_pages": "turn the memory that clients register into huge pages",
        "arena_bytes": "memory for blocks that do not lie in registered memory",
        "call_seconds": "a server that takes longer to answer counts as lost",
        "open_seconds": "the same for its first answer, for which it may open its tiers",
        "reconnect_seconds": "longest pause between attempts to reach a server again",
    },
    "vllm": {
        "host_memory_bytes": "host memory that vLLM itself takes for offloading",
        "blocks_per_chunk": "vLLM blocks that are stored as one block of kvstrata",
        "model_revision": "a word that changes with the weights; empty: look at the weights",
        "huge_pages": "turn that host memory into huge pages, in the background",
    },
}

HEADER = """\
# Configuration of kvstrata. Every key is here; a key that has its default value can be left out.
# A size is a number of bytes, or text such as "64GiB" or "1.5TB".
"""
TIERS = "# Where blocks lie, fastest first: memory (optional), nvme, then what other machines share."
MEMORY_EXAMPLE = "# For a tier in DRAM above it, take the first # away from these lines:"
SECTIONS = {
    "store": "# How blocks move, and what bounds them on their way.",
    "metrics": "# Where a running process shows its counters.",
    "serve": "# One store for several processes of this machine: see `kvstrata serve`.",
    "vllm": "# What `kvstrata vllm-config` writes for vLLM, and what only an operator knows of the model.",
}

_SIZES = {
    "TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10,
    "TB": 10**12, "GB": 10**9, "MB": 10**6, "kB": 10**3,
}  # fmt: skip


def config_text(config: Config) -> str:
    """TOML that `load_config` reads back to an equal Config, with a comment at every key."""
    parts = [HEADER, TIERS]
    if not any(isinstance(tier, MemoryTierConfig) for tier in config.tiers):
        example = _tier_text(MemoryTierConfig()).splitlines()
        parts.append("\n".join([MEMORY_EXAMPLE, *(f"# {line}" for line in example)]) + "\n")
    parts += [_tier_text(tier) for tier in config.tiers]
    for name, about in SECTIONS.items():
        parts.append("\n".join([about, f"[{name}]", *_lines(getattr(config, name), name)]) + "\n")
    return "\n".join(parts)


def _tier_text(tier: TierConfig) -> str:
    return "\n".join(["[[tier]]", f"type = {_text(tier.type)}", *_lines(tier, tier.type)]) + "\n"


def _lines(section: Any, name: str) -> list[str]:
    hints = get_type_hints(type(section))
    pairs = []
    common = {field.name for field in dataclasses.fields(MediumFields)} - set(WORDS[name])
    keys = [field.name for field in dataclasses.fields(section)]
    for key in sorted(keys, key=common.__contains__):
        words = WORDS["tier" if key in common else name][key]
        if get_origin(hints[key]) is Literal:
            choices = list(map(_text, get_args(hints[key])))
            words += f" ({', '.join(choices[:-1])} or {choices[-1]})"
        pairs.append((f"{key} = {_value(key, getattr(section, key))}", words))
    width = max(len(setting) for setting, _ in pairs)
    return [f"{setting:<{width}}  # {words}" for setting, words in pairs]


def _value(key: str, value: Any) -> str:
    if is_size(key):
        exact = [(value // size, unit) for unit, size in _SIZES.items() if value and value % size == 0]
        if exact:
            return _text("{}{}".format(*min(exact)))
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{_text(name)} = {number}" for name, number in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    return _text(value) if isinstance(value, str) else json.dumps(value)


def _text(value: str) -> str:
    """A TOML basic string. JSON's escapes are TOML's, but DEL must be escaped too."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
