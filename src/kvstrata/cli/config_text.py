"""The text of a configuration file: every key of `kvstrata.config` with its value and what it means.

Keys and defaults come from the dataclasses; only the words are here. A key without words is a KeyError.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kvstrata.config import Config, MemoryTierConfig, TierConfig

WORDS: dict[str, dict[str, str]] = {
    "memory": {
        "capacity_bytes": "bound of this tier; all of it is taken from the system, see touch",
        "policy": "who leaves when it is full",
        "policy_options": "parameters of the policy that differ from their defaults",
        "ttl_seconds": "blocks older than this are misses; 0: no limit",
        "verify": "check the checksum on every read from memory",
        "write_mode": "the tier below gets a block later, or before the save is done",
        "promote": "copy a block that was read from the tier below into memory",
        "touch": "take the memory from the system ahead of its first use",
        "numa": 'nodes that it lies on: "auto", "interleave", "off", or a node such as "0"',
        "pin": "register it with the CUDA driver, if there is one",
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
    "vllm": {
        "host_memory_bytes": "host memory that vLLM itself takes for offloading",
        "blocks_per_chunk": "vLLM blocks that are stored as one block of kvstrata",
        "model_revision": "a word that changes with the weights; empty: look at the weights",
    },
}

HEADER = """\
# Configuration of kvstrata. Every key is here; a key that has its default value can be left out.
# A size is a number of bytes, or text such as "64GiB" or "1.5TB".
"""
TIERS = "# Where blocks lie, fastest first: memory (optional), then nvme."
MEMORY_EXAMPLE = "# For a tier in DRAM above it, take the first # away from these lines:"
SECTIONS = {
    "store": "# How blocks move, and what bounds them on their way.",
    "metrics": "# Where a running process shows its counters.",
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
    for key in (field.name for field in dataclasses.fields(section)):
        words = WORDS[name][key]
        if get_origin(hints[key]) is Literal:
            choices = list(map(_text, get_args(hints[key])))
            words += f" ({', '.join(choices[:-1])} or {choices[-1]})"
        pairs.append((f"{key} = {_value(key, getattr(section, key))}", words))
    width = max(len(setting) for setting, _ in pairs)
    return [f"{setting:<{width}}  # {words}" for setting, words in pairs]


def _value(key: str, value: Any) -> str:
    if key.endswith("_bytes"):
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
