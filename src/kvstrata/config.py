"""Configuration: frozen dataclasses read from one TOML file.

Every bound of the system is a field here. An unknown or misspelt key is an error that names the
nearest known one; nothing is ever ignored. A size is an integer of bytes or a string such as "64GiB".
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
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
ClientOptions = Mapping[str, str]
"""Handed to a client library as they are; may hold secrets, so they are never printed."""
WriteMode = Literal["back", "through", "on_evict", "none"]
Attach = Literal["no", "always", "second"]
AttachChunk = Literal["asked", "whole"]
PoolProtocol = Literal["tcp", "rdma"]
Staging = Literal["auto", "always", "never"]
Words = tuple[str, ...]
FullQueue = Literal["drop", "throttle"]
Sync = Literal["flush", "always"]
IoEngine = Literal["auto", "io_uring", "threads"]
Verify = Literal["always", "never"]
Touch = Literal["background", "now", "no"]
Pin = Literal["auto", "no"]
Prepare = Literal["ahead", "all", "no"]
MoverName = Literal["engine", "nixl"]

KIB, MIB, GIB = 2**10, 2**20, 2**30
SIZE_LIMIT = 2**63
"""No file system addresses more."""
COUNT_LIMIT = SIZE_LIMIT - 1
BATCH_LIMIT = 2**20
"""Tables keep that many ids beside those of their slots."""
NUMBER_LIMIT = 10**9
"""Of times in seconds: waiting for longer, or for nan, is an error of its own in the system."""
LEAST_PART_BYTES = 5 * MIB
MOST_PARTS = 10_000
"""Bounds of S3 for the parts of one upload."""
OBJECT_SCHEMES = ("s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss", "http", "https", "file")
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


def is_size(key: str) -> bool:
    """Is the value of a key of this name a size?"""
    return key.endswith(("_bytes", "_bytes_per_second", "_bytes_per_day"))


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
    promote: bool = True
    touch: Touch = "background"
    numa: str = "auto"
    pin: Pin = "auto"

    type = "memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class MediumFields:
    """What every tier has but memory: how it gets blocks, and what it may cost when it fails.

    deadline_seconds, breaker_failures, breaker_retry_seconds: 0 for the store's.
    """

    write_mode: WriteMode = "back"
    deadline_seconds: float = 0.0
    breaker_failures: int = 0
    breaker_retry_seconds: float = 0.0
    demote_bytes: int = 64 * MIB
    attach: Attach = "no"
    attach_reads: int = 2
    attach_ghosts: int = 65_536
    attach_namespaces: Words = ()
    attach_min_bytes: int = 0
    attach_max_bytes: int = 0
    attach_bytes_per_second: int = 0
    attach_bytes_per_day: int = 0
    attach_chunk: AttachChunk = "asked"
    attach_staging_bytes: int = 64 * MIB
    read_ahead_blocks: int = 0


@dataclass(frozen=True, slots=True)
class NvmeTierConfig(MediumFields):
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


@dataclass(frozen=True, slots=True)
class SharedFsTierConfig(MediumFields):
    """Packed extents in one folder that several machines mount, shared by all members that name it."""

    path: str = ""
    capacity_bytes: int = 64 * GIB
    policy: Policy = "lru"
    policy_options: PolicyOptions = field(default_factory=dict)
    ttl_seconds: float = 0.0
    extent_bytes: int = 64 * MIB
    publish_seconds: float = 1.0
    refresh_seconds: float = 1.0
    lease_seconds: float = 10.0
    access_seconds: float = 5.0
    access_bytes: int = 256 * KIB
    open_files: int = 256
    open_threads: int = 4
    direct_io: bool = True
    mover: MoverName = "engine"
    burst_bytes: int = 256 * MIB
    live_share: float = 0.85
    collect: bool = True
    rewrite_bytes_per_second: int = 64 * MIB
    stripe_count: int = 0
    stripe_bytes: int = 4 * MIB
    dom_bytes: int = 64 * KIB

    type = "shared_fs"


@dataclass(frozen=True, slots=True)
class ObjectStoreTierConfig(MediumFields):
    """Packed extents as objects of one bucket, shared by all members that name the same url."""

    url: str = ""
    options: ClientOptions = field(default_factory=dict, repr=False)
    capacity_bytes: int = 64 * GIB
    policy: Policy = "lru"
    policy_options: PolicyOptions = field(default_factory=dict)
    ttl_seconds: float = 0.0
    extent_bytes: int = 64 * MIB
    part_bytes: int = 8 * MIB
    parts_in_flight: int = 8
    publish_seconds: float = 2.0
    refresh_seconds: float = 5.0
    lease_seconds: float = 30.0
    access_seconds: float = 10.0
    access_bytes: int = MIB
    io_threads: int = 8
    staging_bytes: int = 256 * MIB
    merge_gap_bytes: int = 256 * KIB
    request_seconds: float = 10.0
    retries: int = 3
    burst_bytes: int = 256 * MIB
    live_share: float = 0.85
    collect: bool = True
    rewrite_bytes_per_second: int = 64 * MIB

    type = "object_store"


@dataclass(frozen=True, slots=True)
class PoolTierConfig(MediumFields):
    """Memory of many machines, lent to and served by Mooncake Store.

    segment_bytes: what this process lends. hostname: where others reach it; empty: as the master does.
    """

    master: str = ""
    metadata: str = "P2PHANDSHAKE"
    hostname: str = ""
    protocol: PoolProtocol = "tcp"
    devices: str = ""
    segment_bytes: int = 0
    buffer_bytes: int = 16 * MIB
    replicas: int = 1
    ttl_seconds: float = 0.0
    io_threads: int = 3
    calls: int = 1
    batch_bytes: int = 64 * MIB
    staging: Staging = "auto"
    staging_bytes: int = 192 * MIB
    lookup_seconds: float = 1.0
    there_seconds: float = 30.0
    missing_seconds: float = 2.0
    remembered_keys: int = 1_000_000
    asking_keys: int = 65_536
    rpc_seconds: float = 2.0

    type = "pool"


TierConfig = MemoryTierConfig | NvmeTierConfig | SharedFsTierConfig | ObjectStoreTierConfig | PoolTierConfig
_TIER_TYPES: dict[str, type[TierConfig]] = {
    "memory": MemoryTierConfig,
    "nvme": NvmeTierConfig,
    "shared_fs": SharedFsTierConfig,
    "object_store": ObjectStoreTierConfig,
    "pool": PoolTierConfig,
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
    staging_bytes: int = 64 * MIB
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
class ServeConfig:
    """One store for several processes of a machine: the server's side, and the clients'."""

    socket: str = ""
    connect: str = ""
    max_clients: int = 32
    client_bytes: int = GIB
    client_transfers: int = 1_024
    client_regions: int = 64
    other_users: bool = False
    huge_pages: bool = True
    arena_bytes: int = 64 * MIB
    call_seconds: float = 1.0
    open_seconds: float = 30.0
    reconnect_seconds: float = 2.0


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """What `kvstrata vllm-config` writes for vLLM, and what only an operator knows of the model."""

    host_memory_bytes: int = 4 * GIB
    blocks_per_chunk: int = 8
    model_revision: str = ""
    huge_pages: bool = True


@dataclass(frozen=True, slots=True)
class Config:
    """The whole file. tiers: fastest first."""

    store: StoreConfig = field(default_factory=StoreConfig)
    tiers: tuple[TierConfig, ...] = ()
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)


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
    _reject_unknown(data, ["store", "tier", "metrics", "vllm", "serve"], source, "")
    raw_tiers = data.get("tier", [])
    if not isinstance(raw_tiers, list):
        raise ConfigError(f"{source}: tier: write [[tier]] with two brackets, once per tier")
    tiers = tuple(_tier(raw, f"tier[{index}]", source) for index, raw in enumerate(raw_tiers))
    config = Config(
        store=_section(StoreConfig, data.get("store", {}), "store", source),
        tiers=tiers,
        metrics=_section(MetricsConfig, data.get("metrics", {}), "metrics", source),
        vllm=_section(VllmConfig, data.get("vllm", {}), "vllm", source),
        serve=_section(ServeConfig, data.get("serve", {}), "serve", source),
    )
    _check(config, source)
    return config


def tier_names(tiers: Sequence[TierConfig]) -> list[str]:
    """The word for each tier in metrics: its type, and from the second of a type on its number too."""
    kinds = [tier.type for tier in tiers]
    counts = [kinds[: place + 1].count(kind) for place, kind in enumerate(kinds)]
    return [kind if count == 1 else f"{kind}{count}" for kind, count in zip(kinds, counts, strict=True)]


def attach_staging_bytes(tiers: Sequence[TierConfig]) -> int:
    """Bound of what waits to be written into a read cache; 0 without one."""
    caches = [tier for tier in tiers if isinstance(tier, MediumFields) and tier.attach != "no"]
    return sum(tier.attach_staging_bytes for tier in caches)


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
    if kind == "memory" and "write_mode" in raw:
        raise ConfigError(
            f"{source}: {where}.write_mode: how a tier gets blocks from those above it is its own key now; "
            "write it into the table of the tier below memory"
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
    if is_size(key):
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ConfigError(f'{where}: {value!r} is not a size; write for example "64GiB"')
        try:
            return parse_size(value)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
    if hint == PolicyOptions:
        return _options(value, where)
    if hint == ClientOptions:
        return _client_options(value, where)
    if hint == Words:
        return _words(value, where)
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


def _words(value: Any, where: str) -> Words:
    """A list of strings."""
    if not isinstance(value, list | tuple) or not all(isinstance(word, str) for word in value):
        raise ConfigError(f'{where}: {value!r} is not a list of strings; write for example ["1f3a"]')
    return tuple(value)


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


def _client_options(value: Any, where: str) -> dict[str, str]:
    """A table of strings; which names there are is checked by the client library."""
    if not isinstance(value, Mapping):
        raise ConfigError(f'{where}: not a table; write for example {{ region = "eu-central-1" }}')
    for name, word in value.items():
        if not isinstance(word, str | int):
            raise ConfigError(f"{where}.{name}: expected a string, got {type(word).__name__}")
    return {
        name: str(word).lower() if isinstance(word, bool) else str(word) for name, word in value.items()
    }


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
        "staging_bytes",
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
    _check_serve(config.serve, source, require)
    require(config.vllm.host_memory_bytes >= 1, "vllm.host_memory_bytes", "must be at least 1")

    paths: set[Path] = set()
    for index, tier in enumerate(config.tiers):
        where = f"tier[{index}]"
        if isinstance(tier, PoolTierConfig):
            _check_pool(tier, where, require)
        else:
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
            require(tier.segment_bytes >= MIB, f"{where}.segment_bytes", "must be at least 1 MiB")
        if isinstance(tier, SharedFsTierConfig):
            _check_shared(tier, where, require)
            for name, most in (("open_files", 65_536), ("open_threads", 256)):
                require(1 <= getattr(tier, name) <= most, f"{where}.{name}", f"must be from 1 to {most}")
            require(
                -1 <= tier.stripe_count <= 2_000,
                f"{where}.stripe_count",
                "must be from -1 to 2000; 0 leaves the folder's layout alone",
            )
            require(
                tier.stripe_bytes >= 64 * KIB and tier.stripe_bytes % (64 * KIB) == 0,
                f"{where}.stripe_bytes",
                "must be a multiple of 64 KiB",
            )
            require(tier.dom_bytes % (64 * KIB) == 0, f"{where}.dom_bytes", "must be a multiple of 64 KiB")
        if isinstance(tier, ObjectStoreTierConfig):
            _check_shared(tier, where, require)
            _check_object_store(tier, where, require)
            require(
                Path(tier.url.rstrip("/")) not in paths, f"{where}.url", "is already used by another tier"
            )
            paths.add(Path(tier.url.rstrip("/")))
        if isinstance(tier, NvmeTierConfig | SharedFsTierConfig):
            require(bool(tier.path), f"{where}.path", "is missing; name the tier's folder")
            require("\0" not in tier.path, f"{where}.path", "cannot hold a NUL character")
            try:
                folder = Path(tier.path).expanduser().absolute()
            except RuntimeError:
                raise ConfigError(f"{source}: {where}.path: {tier.path!r}: no such user") from None
            require(folder not in paths, f"{where}.path", f"{folder} is already used by another tier")
            paths.add(folder)
    _check_stack(config.tiers, require)


def _check_shared(
    tier: SharedFsTierConfig | ObjectStoreTierConfig,
    where: str,
    require: Callable[[bool, str, str], None],
) -> None:
    """Of tiers that many members share."""
    require(tier.extent_bytes >= MIB, f"{where}.extent_bytes", "must be at least 1 MiB")
    require(tier.access_bytes >= 4 * KIB, f"{where}.access_bytes", "must be at least 4 KiB")
    for name in ("publish_seconds", "refresh_seconds", "lease_seconds", "access_seconds"):
        require(getattr(tier, name) > 0, f"{where}.{name}", "must be above 0")
    require(0 < tier.live_share <= 1, f"{where}.live_share", "must be above 0 and at most 1")
    require(
        tier.rewrite_bytes_per_second >= MIB,
        f"{where}.rewrite_bytes_per_second",
        "must be at least 1 MiB",
    )


def _check_object_store(
    tier: ObjectStoreTierConfig, where: str, require: Callable[[bool, str, str], None]
) -> None:
    fault = object_url_fault(tier.url)
    require(not fault, f"{where}.url", fault)
    require(
        tier.part_bytes >= LEAST_PART_BYTES and tier.extent_bytes <= MOST_PARTS * tier.part_bytes,
        f"{where}.part_bytes",
        f"must be at least 5 MiB, and extent_bytes at most {MOST_PARTS} times as much",
    )
    require(
        tier.staging_bytes >= tier.extent_bytes,
        f"{where}.staging_bytes",
        "must be at least extent_bytes: extents are packed in memory",
    )
    for name in ("io_threads", "parts_in_flight"):
        require(1 <= getattr(tier, name) <= 256, f"{where}.{name}", "must be from 1 to 256")
    require(tier.request_seconds > 0, f"{where}.request_seconds", "must be above 0")
    require(0 <= tier.retries <= 100, f"{where}.retries", "must be from 0 to 100")


def object_url_fault(url: str) -> str:
    """Why this names no bucket that several processes share; empty if it does."""
    if not url:
        return "is missing; write s3://bucket/prefix, gs://bucket/prefix or az://account/container/prefix"
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in OBJECT_SCHEMES:
        return f"is not one of a store that members share; known: {', '.join(OBJECT_SCHEMES)}"
    if not rest.strip("/") or (scheme != "file" and rest.startswith("/")):
        return "names no bucket"
    if "\0" in url or "@" in rest.partition("/")[0]:
        return "cannot hold a password or a NUL character; keys go into options or the environment"
    return ""


def _check_pool(tier: PoolTierConfig, where: str, require: Callable[[bool, str, str], None]) -> None:
    require(bool(tier.master), f"{where}.master", 'is missing; for example "10.0.0.1:50051"')
    require(1 <= tier.replicas <= 64, f"{where}.replicas", "must be from 1 to 64")
    for name in ("io_threads", "calls"):
        require(1 <= getattr(tier, name) <= 256, f"{where}.{name}", "must be from 1 to 256")
    for name in ("batch_bytes", "staging_bytes", "buffer_bytes"):
        require(getattr(tier, name) >= MIB, f"{where}.{name}", "must be at least 1 MiB")
    for name in ("remembered_keys", "asking_keys"):
        known = getattr(tier, name)
        require(1 <= known <= COUNT_LIMIT, f"{where}.{name}", f"must be from 1 to {COUNT_LIMIT}")
    for name in ("lookup_seconds", "there_seconds", "missing_seconds"):
        require(getattr(tier, name) >= 0, f"{where}.{name}", "cannot be negative")
    require(0.1 <= tier.rpc_seconds <= 60, f"{where}.rpc_seconds", "must be from 0.1 to 60")


def _check_stack(tiers: Sequence[TierConfig], require: Callable[[bool, str, str], None]) -> None:
    """How tiers go together, and the keys that say so."""
    kinds = [tier.type for tier in tiers]
    require(kinds.count("memory") <= 1, "tier", "there can be one memory tier only")
    require("memory" not in kinds[1:], "tier", "put memory first")
    attaching = 0
    for index, tier in enumerate(tiers):
        if not isinstance(tier, MediumFields):
            continue
        where = f"tier[{index}]"
        for name in ("deadline_seconds", "breaker_failures", "breaker_retry_seconds"):
            require(getattr(tier, name) >= 0, f"{where}.{name}", "cannot be negative; 0: as the store's")
        for name in ("attach_reads", "attach_ghosts", "attach_staging_bytes", "demote_bytes"):
            good = 1 <= getattr(tier, name) <= COUNT_LIMIT
            require(good, f"{where}.{name}", f"must be from 1 to {COUNT_LIMIT}")
        require(
            0 <= tier.read_ahead_blocks <= BATCH_LIMIT,
            f"{where}.read_ahead_blocks",
            f"must be from 0 to {BATCH_LIMIT}",
        )
        require(
            not tier.attach_max_bytes or tier.attach_min_bytes <= tier.attach_max_bytes,
            f"{where}.attach_max_bytes",
            "is below attach_min_bytes; 0: no bound",
        )
        for prefix in tier.attach_namespaces:
            require(
                re.fullmatch(r"[0-9a-f]{1,64}", prefix) is not None,
                f"{where}.attach_namespaces",
                f"{prefix!r} is not the beginning of a namespace's digest in hexadecimal digits",
            )
        if tier.write_mode == "on_evict":
            require(
                index > 0 and kinds[index - 1] in ("memory", "nvme"),
                f"{where}.write_mode",
                '"on_evict" needs a memory or nvme tier right above, whose policy says what leaves',
            )
        if tier.attach != "no":
            attaching += 1
            require(index + 1 < len(tiers), f"{where}.attach", "there is no tier below to attach from")
            require(attaching == 1, f"{where}.attach", "one tier can attach only")


def _check_serve(serve: ServeConfig, source: str, require: Callable[[bool, str, str], None]) -> None:
    for name in ("socket", "connect"):
        path = getattr(serve, name)
        require("\0" not in path, f"serve.{name}", "cannot hold a NUL character")
        try:
            Path(path).expanduser()
        except RuntimeError:
            raise ConfigError(f"{source}: serve.{name}: {path!r}: no such user") from None
    for name in ("max_clients", "client_bytes", "client_transfers", "client_regions", "arena_bytes"):
        good = 1 <= getattr(serve, name) <= COUNT_LIMIT
        require(good, f"serve.{name}", f"must be from 1 to {COUNT_LIMIT}")
    for name in ("call_seconds", "open_seconds", "reconnect_seconds"):
        require(getattr(serve, name) > 0, f"serve.{name}", "must be above 0")
