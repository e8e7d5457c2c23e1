"""Configuration: frozen dataclasses read from one TOML file.

Every bound of the system is a field here. An unknown or misspelt key is an error that names the
nearest known one; nothing is ever ignored. A size is an integer of bytes or a string such as "64GiB".
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from kvstrata.errors import ConfigError

Policy = Literal[
    "lru",
    "lru_forward",
    "arc",
    "twoq",
    "clock_pro",
    "lfu_aging",
    "tinylfu_slru",
    "s3fifo",
    "sieve",
    "mq",
    "gdsf",
    "lirs",
]
PolicyOptions = Mapping[str, float]
WriteMode = Literal["back", "through"]
FullQueue = Literal["drop", "throttle"]
Sync = Literal["flush", "always"]
IoEngine = Literal["auto", "io_uring", "threads"]
Verify = Literal["always", "never"]
Touch = Literal["background", "now", "no"]
Pin = Literal["auto", "no"]
Prepare = Literal["ahead", "all", "no"]

KIB, MIB, GIB = 2**10, 2**20, 2**30
SIZE_LIMIT = 2**63
"""No file system addresses more."""
COUNT_LIMIT = SIZE_LIMIT - 1
BATCH_LIMIT = 2**20
"""Tables keep that many ids beside those of their slots."""
NUMBER_LIMIT = 10**9
"""Of times in seconds: waiting for longer, or for nan, is an error of its own in the system."""
NUMA_WORDS = ("auto", "interleave", "off")
PREPARE_LIMIT = 64
"""Segments kept ready; more would be another word for "all"."""
_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "pb": 10**15,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": 2**40, "pib": 2**50,
}  # fmt: skip


def parse_size(text: str | int) -> int:
    """Bytes of "4096", "64 KiB", "1.5GB". Raises ValueError for anything else."""
    if isinstance(text, int):
        if not 0 <= text < SIZE_LIMIT:
            raise ValueError(f"a size must be from 0 to {SIZE_LIMIT - 1} bytes")
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in _UNITS:
        raise ValueError(f'{text!r} is not a size; write for example 1073741824 or "1GiB"')
    size = float(match[1]) * _UNITS[match[2].lower()]
    if size >= SIZE_LIMIT:
        raise ValueError(f"a size must be from 0 to {SIZE_LIMIT - 1} bytes")
    return int(size)


def format_size(size: float) -> str:
    """Bytes for people: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


@dataclass(frozen=True, slots=True)
class MemoryTierConfig:
    """DRAM: one arena of slots."""

    capacity_bytes: int = GIB
    policy: Policy = "lru"
    policy_options: PolicyOptions = field(default_factory=dict)
    ttl_seconds: float = 0.0
    verify: Verify = "always"
    write_mode: WriteMode = "back"
    promote: bool = True
    touch: Touch = "background"
    numa: str = "auto"
    pin: Pin = "auto"

    type = "memory"


@dataclass(frozen=True, slots=True)
class NvmeTierConfig:
    """Slots in preallocated segment files of one local folder."""

    path: str = ""
    capacity_bytes: int = 16 * GIB
    policy: Policy = "lru"
    policy_options: PolicyOptions = field(default_factory=dict)
    ttl_seconds: float = 0.0
    segment_bytes: int = GIB
    direct_io: bool = True
    sync: Sync = "flush"
    prepare: Prepare = "ahead"
    prepare_segments: int = 1

    type = "nvme"


TierConfig = MemoryTierConfig | NvmeTierConfig
_TIER_TYPES: dict[str, type[MemoryTierConfig] | type[NvmeTierConfig]] = {
    "memory": MemoryTierConfig,
    "nvme": NvmeTierConfig,
}


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """How blocks move, and what bounds them on their way."""

    io_deadline_seconds: float = 5.0
    io_engine: IoEngine = "auto"
    io_depth: int = 16
    io_threads: int = 8
    io_store_threads: int = 6
    queue_bytes: int = GIB
    queue_blocks: int = 65_536
    load_queue_blocks: int = 65_536
    batch_blocks: int = 16_384
    full_queue: FullQueue = "drop"
    throttle_seconds: float = 0.02
    breaker_failures: int = 3
    breaker_retry_seconds: float = 10.0
    close_seconds: float = 30.0
    events: int = 1_000
    salt: str = ""
    capture: str = ""
    capture_bytes: int = GIB
    capture_queue_bytes: int = 64 * MIB
    capture_seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """Where a running process shows its counters. Port 0 means: nowhere."""

    host: str = "127.0.0.1"
    port: int = 0


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """What `kvstrata vllm-config` writes for vLLM, and what only an operator knows of the model."""

    host_memory_bytes: int = 4 * GIB
    blocks_per_chunk: int = 8
    model_revision: str = ""


@dataclass(frozen=True, slots=True)
class Config:
    """The whole file. tiers: fastest first."""

    store: StoreConfig = field(default_factory=StoreConfig)
    tiers: tuple[TierConfig, ...] = ()
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)


def load_config(path: str | Path) -> Config:
    """Read a TOML file. Raises ConfigError that names the file, the key and what to do."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `kvstrata init {path}` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        data = tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, and numbers of thousands of digits
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    except RecursionError:
        raise ConfigError(f"{path}: not valid TOML: nested too deeply") from None
    return parse_config(data, source=str(path))


def parse_config(data: Mapping[str, Any], source: str = "config") -> Config:
    """Check a parsed TOML mapping. source names it in errors. Raises ConfigError."""
    _reject_unknown(data, ["store", "tier", "metrics", "vllm"], source, "")
    raw_tiers = data.get("tier", [])
    if not isinstance(raw_tiers, list):
        raise ConfigError(f"{source}: tier: write [[tier]] with two brackets, once per tier")
    tiers = tuple(_tier(raw, f"tier[{index}]", source) for index, raw in enumerate(raw_tiers))
    config = Config(
        store=_section(StoreConfig, data.get("store", {}), "store", source),
        tiers=tiers,
        metrics=_section(MetricsConfig, data.get("metrics", {}), "metrics", source),
        vllm=_section(VllmConfig, data.get("vllm", {}), "vllm", source),
    )
    _check(config, source)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The mapping that `parse_config` reads back to an equal Config."""
    data = dataclasses.asdict(config)
    tiers = data.pop("tiers")
    data["tier"] = [{"type": tier.type} | raw for tier, raw in zip(config.tiers, tiers, strict=True)]
    return data


def _tier(raw: Any, where: str, source: str) -> TierConfig:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{source}: {where}: must be a table")
    kind = raw.get("type")
    if not isinstance(kind, str) or kind not in _TIER_TYPES:
        nearest = _nearest(str(kind), list(_TIER_TYPES))
        raise ConfigError(
            f"{source}: {where}.type: {kind!r} is not a tier; known: {', '.join(_TIER_TYPES)}{nearest}"
        )
    rest = {key: value for key, value in raw.items() if key != "type"}
    tier: TierConfig = _section(_TIER_TYPES[kind], rest, where, source)
    return tier


def _section(cls: type[Any], raw: Any, where: str, source: str) -> Any:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{source}: {where}: must be a table")
    _reject_unknown(raw, [f.name for f in dataclasses.fields(cls)], source, where)
    hints = get_type_hints(cls)
    return cls(
        **{key: _value(value, hints[key], key, f"{source}: {where}.{key}") for key, value in raw.items()}
    )


def _value(value: Any, hint: Any, key: str, where: str) -> Any:
    if key.endswith("_bytes"):
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ConfigError(f'{where}: {value!r} is not a size; write for example "64GiB"')
        try:
            return parse_size(value)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
    if hint == PolicyOptions:
        return _options(value, where)
    choices = get_args(hint)
    if choices:
        if value not in choices:
            nearest = _nearest(str(value), list(choices))
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(repr, choices))}{nearest}")
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) < NUMBER_LIMIT:
            raise ConfigError(f"{where}: {value!r} is not a number below {NUMBER_LIMIT}")
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where}: expected {hint.__name__}, got {type(value).__name__} {value!r}")
    return value


def _options(value: Any, where: str) -> dict[str, float]:
    """A table of numbers; which names a policy has is checked when it is made."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {value!r} is not a table; write for example {{ cms_width = 65536 }}")
    for name, number in value.items():
        if (
            isinstance(number, bool)
            or not isinstance(number, int | float)
            or not abs(number) < NUMBER_LIMIT
        ):
            raise ConfigError(f"{where}.{name}: {number!r} is not a number below {NUMBER_LIMIT}")
    return {name: float(number) for name, number in value.items()}


def _reject_unknown(raw: Mapping[str, Any], known: list[str], source: str, where: str) -> None:
    for key in raw:
        if key not in known:
            place = f"{where}.{key}" if where else key
            raise ConfigError(f"{source}: unknown key {place}{_nearest(key, known)}")


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(known)}"


def _check(config: Config, source: str) -> None:
    """Relations between fields. Sizes against a block are checked when a tier opens."""

    def require(good: bool, key: str, message: str) -> None:
        if not good:
            raise ConfigError(f"{source}: {key}: {message}")

    store = config.store
    require(store.io_deadline_seconds > 0, "store.io_deadline_seconds", "must be above 0")
    for name in ("io_depth", "io_threads"):
        require(1 <= getattr(store, name) <= 256, f"store.{name}", "must be from 1 to 256")
    require(
        1 <= store.io_store_threads <= store.io_threads,
        "store.io_store_threads",
        f"must be from 1 to io_threads ({store.io_threads})",
    )
    for name in (
        "queue_bytes",
        "queue_blocks",
        "load_queue_blocks",
        "batch_blocks",
        "breaker_failures",
        "events",
    ):
        require(
            1 <= getattr(store, name) <= COUNT_LIMIT, f"store.{name}", f"must be from 1 to {COUNT_LIMIT}"
        )
    require(store.batch_blocks <= BATCH_LIMIT, "store.batch_blocks", f"must be from 1 to {BATCH_LIMIT}")
    for name in ("throttle_seconds", "breaker_retry_seconds", "close_seconds"):
        require(getattr(store, name) >= 0, f"store.{name}", "cannot be negative")
    for name in ("capture_bytes", "capture_queue_bytes"):
        require(getattr(store, name) >= MIB, f"store.{name}", "must be at least 1 MiB")
    require(store.capture_seconds > 0, "store.capture_seconds", "must be above 0")
    require("\0" not in store.capture, "store.capture", "cannot hold a NUL character")
    try:
        Path(store.capture).expanduser()
    except RuntimeError:
        raise ConfigError(f"{source}: store.capture: {store.capture!r}: no such user") from None
    require(0 <= config.metrics.port <= 65535, "metrics.port", "must be from 0 to 65535")
    require(config.vllm.blocks_per_chunk >= 1, "vllm.blocks_per_chunk", "must be at least 1")
    require(config.vllm.host_memory_bytes >= 1, "vllm.host_memory_bytes", "must be at least 1")

    paths: set[Path] = set()
    for index, tier in enumerate(config.tiers):
        where = f"tier[{index}]"
        require(tier.capacity_bytes >= 1, f"{where}.capacity_bytes", "must be at least 1")
        require(tier.ttl_seconds >= 0, f"{where}.ttl_seconds", "cannot be negative; 0 means no TTL")
        if isinstance(tier, MemoryTierConfig):
            require(
                tier.numa in NUMA_WORDS or (re.fullmatch(r"\d{1,3}", tier.numa, re.ASCII) is not None),
                f"{where}.numa",
                f'{tier.numa!r} is not one of {", ".join(map(repr, NUMA_WORDS))}, or a node such as "0"',
            )
        if isinstance(tier, NvmeTierConfig):
            require(
                1 <= tier.prepare_segments <= PREPARE_LIMIT,
                f"{where}.prepare_segments",
                f"must be from 1 to {PREPARE_LIMIT}",
            )
            require(bool(tier.path), f"{where}.path", "is missing; name the tier's folder")
            require(tier.segment_bytes >= MIB, f"{where}.segment_bytes", "must be at least 1 MiB")
            require("\0" not in tier.path, f"{where}.path", "cannot hold a NUL character")
            try:
                folder = Path(tier.path).expanduser().absolute()
            except RuntimeError:
                raise ConfigError(f"{source}: {where}.path: {tier.path!r}: no such user") from None
            require(folder not in paths, f"{where}.path", f"{folder} is already used by another tier")
            paths.add(folder)
    kinds = [tier.type for tier in config.tiers]
    require(kinds.count("memory") <= 1, "tier", "there can be one memory tier only")
    require(kinds.count("nvme") <= 1, "tier", "there can be one nvme tier only")
    require(kinds in ([], ["memory"], ["nvme"], ["memory", "nvme"]), "tier", "put memory before nvme")
