"""The configuration: every key, every bound, and an answer that helps for every mistake."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.config import (
    GIB,
    Config,
    MediumFields,
    MemoryTierConfig,
    MetricsConfig,
    NvmeTierConfig,
    ObjectStoreTierConfig,
    PolicyOptions,
    PoolTierConfig,
    SharedFsTierConfig,
    StoreConfig,
    VllmConfig,
    Words,
    attach_staging_bytes,
    format_size,
    is_size,
    load_config,
    parse_config,
    parse_size,
    tier_names,
    to_dict,
)
from kvstrata.errors import ConfigError

SECTIONS: dict[str, type] = {
    "store": StoreConfig,
    "metrics": MetricsConfig,
    "vllm": VllmConfig,
    "memory": MemoryTierConfig,
    "nvme": NvmeTierConfig,
}
EVERY_KEY = [
    (section, field.name) for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)
]


def document(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """A whole configuration with these values in one section; a tier lies above another."""
    if section == "nvme":
        below = {"type": "nvme", "path": "below"}
        return {"tier": [{"type": "nvme", "path": "cache", **values}, below]}
    if section == "memory":
        return {"tier": [{"type": "memory", **values}]}
    return {section: values}


def section_of(config: Config, section: str) -> Any:
    return config.tiers[0] if section in ("memory", "nvme") else getattr(config, section)


def another_value(section: str, key: str) -> Any:
    """A good value that is not the default."""
    hint = get_type_hints(SECTIONS[section])[key]
    default = getattr(SECTIONS[section](), key)
    if hint == PolicyOptions:
        return {"cms_width": 65_536.0}
    if hint == Words:
        return ("1f3a",)
    if get_args(hint):
        return next(choice for choice in get_args(hint) if choice != default)
    if hint is bool:
        return not default
    if key == "numa":
        return "interleave"
    if hint is str:
        return "something"
    if key == "io_store_threads":
        return default - 1
    return default + 1


@pytest.mark.parametrize(("section", "key"), EVERY_KEY)
def test_every_key_is_read(section: str, key: str) -> None:
    value = another_value(section, key)
    config = parse_config(document(section, {key: value}))
    assert getattr(section_of(config, section), key) == value


@pytest.mark.parametrize(("section", "key"), EVERY_KEY)
def test_a_misspelt_key_names_the_nearest(section: str, key: str) -> None:
    misspelt = key[:-1] + "x" if len(key) > 4 else key + "x"
    where = "tier[0]" if section in ("memory", "nvme") else section
    with pytest.raises(ConfigError) as caught:
        parse_config(document(section, {misspelt: 1}), source="my.toml")
    message = str(caught.value)
    assert f"my.toml: unknown key {where}.{misspelt}" in message
    nearest = re.search(r"did you mean '(\w+)'", message)
    assert nearest and nearest[1] in {field.name for field in dataclasses.fields(SECTIONS[section])}
    if len(key) > 8:
        assert nearest[1] == key


@pytest.mark.parametrize(("section", "key"), EVERY_KEY)
@pytest.mark.parametrize("wrong", [[], {}, "no such word", None, 1 << 80], ids=repr)
def test_a_value_of_a_wrong_type_names_the_key(section: str, key: str, wrong: Any) -> None:
    hint = get_type_hints(SECTIONS[section])[key]
    if (hint is str and isinstance(wrong, str)) or (hint, wrong) in ((PolicyOptions, {}), (Words, [])):
        return
    if hint is int and key != "port" and not is_size(key) and wrong == 1 << 80:
        return  # a large number is a number
    if isinstance(wrong, int) and hint in (str, bool):
        wrong = 1
    with pytest.raises(ConfigError, match=re.escape(f".{key}: ")):
        parse_config(document(section, {key: wrong}))


@pytest.mark.parametrize("wrong", ["much", True, float("nan"), float("inf"), [1], None], ids=repr)
def test_a_policy_option_that_is_no_number_is_named(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape("tier[0].policy_options.age_every: ")):
        parse_config(document("memory", {"policy_options": {"age_shift": 2, "age_every": wrong}}))


@pytest.mark.parametrize(("section", "key"), EVERY_KEY)
def test_true_is_no_number_and_one_is_no_truth(section: str, key: str) -> None:
    hint = get_type_hints(SECTIONS[section])[key]
    if hint in (int, float):
        with pytest.raises(ConfigError, match=key):
            parse_config(document(section, {key: True}))
    elif hint is bool:
        with pytest.raises(ConfigError, match=key):
            parse_config(document(section, {key: 1}))


@pytest.mark.parametrize(
    ("misspelt", "hint"),
    [
        ({"stores": {}}, "did you mean 'store'"),
        ({"tiers": []}, "did you mean 'tier'"),
        ({"quux": 1}, "known keys: store, tier, metrics, vllm"),
        ({"store": {"zzz": 1}}, "known keys: io_deadline_seconds"),
        ({"tier": [{"type": "memmory"}]}, "did you mean 'memory'"),
        ({"tier": [{"type": "tape"}]}, "known: memory, nvme"),
        ({"tier": [{"capacity_bytes": 1}]}, "known: memory, nvme"),
        ({"tier": [{"type": ["nvme"]}]}, "known: memory, nvme"),
        ({"tier": [{"type": "memory", "policy": "lruu"}]}, "did you mean 'lru'"),
        ({"tier": [{"type": "memory", "path": "x"}]}, "unknown key tier[0].path"),
        ({"store": {"full_queue": "dorp"}}, "did you mean 'drop'"),
        ({"tier": [{"type": "memory", "numa": "-1"}]}, "tier[0].numa: '-1' is not one of 'auto'"),
        ({"tier": [{"type": "memory", "numa": "1024"}]}, "a node such as"),
    ],
    ids=str,
)
def test_words_that_are_not_known(misspelt: dict[str, Any], hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(misspelt)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"store": 3},
        {"store": []},
        {"tier": {"type": "memory"}},
        {"tier": "memory"},
        {"tier": [3]},
        {"vllm": "x"},
    ],
    ids=str,
)
def test_a_section_of_a_wrong_shape(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"table|two brackets"):
        parse_config(wrong)


# Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0), (4096, 4096), ("0", 0), ("4096", 4096), ("1 B", 1), ("1kB", 1_000), ("1KB", 1_000),
        ("1KiB", 1_024), ("1.5GB", 1_500_000_000), ("64 GiB", 64 * GIB), ("2tib", 2**41),
        (" 1 MiB ", 2**20), ("0.5KiB", 512), ("1PiB", 2**50),
    ],
)  # fmt: skip
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "1 GiBs", "-1", "1e9", "1,5GB", "0x10", "1 2", "1.GiB", -1, 2**64]
)
def test_what_is_no_size(text: str | int) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)
    with pytest.raises(ConfigError, match=r"^f: store\.queue_bytes: .*size"):
        parse_config({"store": {"queue_bytes": text}}, source="f")


@given(count=st.integers(0, 10_000), unit=st.sampled_from(["B", "KiB", "MiB", "GiB", "TiB"]))
def test_whole_sizes_are_exact(count: int, unit: str) -> None:
    factor = 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit)
    assert parse_size(f"{count}{unit}") == parse_size(f"{count} {unit.lower()}") == count * factor


@given(size=st.integers(0, 2**62))
def test_a_printed_size_is_near_the_size(size: int) -> None:
    printed = parse_size(format_size(size))
    assert abs(printed - size) <= max(1, size * 0.051)


# Bounds and relations


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("store", "io_deadline_seconds", 0), ("store", "io_deadline_seconds", -1.0),
        ("store", "io_deadline_seconds", float("nan")), ("store", "io_deadline_seconds", float("inf")),
        ("store", "io_threads", 0), ("store", "io_threads", 257), ("store", "io_store_threads", 0),
        ("store", "queue_bytes", 0), ("store", "queue_blocks", 0), ("store", "load_queue_blocks", 0),
        ("store", "batch_blocks", 0), ("store", "breaker_failures", 0), ("store", "events", 0),
        ("store", "throttle_seconds", -0.1), ("store", "breaker_retry_seconds", -1),
        ("store", "close_seconds", -1), ("store", "close_seconds", float("nan")),
        ("store", "capture_bytes", 2**20 - 1), ("store", "capture_queue_bytes", 2**20 - 1),
        ("store", "capture_seconds", 0), ("store", "capture_seconds", -1), ("store", "capture", "a\0b"),
        ("store", "capture", "~nobody-has-this-name/x"),
        ("metrics", "port", -1), ("metrics", "port", 65_536),
        ("vllm", "blocks_per_chunk", 0), ("vllm", "host_memory_bytes", 0),
        ("memory", "capacity_bytes", 0), ("memory", "ttl_seconds", -1),
        ("memory", "ttl_seconds", float("nan")), ("nvme", "capacity_bytes", 0),
        ("nvme", "ttl_seconds", -0.5), ("nvme", "path", ""), ("nvme", "segment_bytes", 2**20 - 1),
        ("nvme", "prepare_segments", 0), ("nvme", "prepare_segments", 65),
        ("nvme", "deadline_seconds", -1), ("nvme", "breaker_failures", -1),
        ("nvme", "breaker_retry_seconds", -0.5), ("nvme", "demote_bytes", 0), ("nvme", "attach_reads", 0),
        ("nvme", "attach_ghosts", 0), ("nvme", "attach_staging_bytes", 0),
        ("nvme", "read_ahead_blocks", -1), ("nvme", "read_ahead_blocks", 2**20 + 1),
        ("nvme", "attach_namespaces", ["xyz"]),
        ("nvme", "attach_namespaces", ["AB"]), ("nvme", "attach_namespaces", "ab"),
        ("nvme", "attach_namespaces", [1]), ("nvme", "write_mode", "on_evict"),
        ("store", "staging_bytes", 0),
    ],
)  # fmt: skip
def test_out_of_bounds(section: str, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(f".{key}: ")):
        parse_config(document(section, {key: value}))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("store", "io_threads", 256), ("store", "throttle_seconds", 0), ("store", "close_seconds", 0),
        ("metrics", "port", 65_535), ("memory", "capacity_bytes", 1), ("nvme", "segment_bytes", "1MiB"),
        ("memory", "ttl_seconds", 0),
    ],
)  # fmt: skip
def test_just_in_bounds(section: str, key: str, value: Any) -> None:
    parse_config(document(section, {key: value}))


def test_more_store_threads_than_threads() -> None:
    with pytest.raises(ConfigError, match=r"io_store_threads: must be from 1 to io_threads \(2\)"):
        parse_config({"store": {"io_threads": 2, "io_store_threads": 3}})


NVME = {"type": "nvme", "path": "a"}
BELOW = {"type": "nvme", "path": "b"}


@pytest.mark.parametrize(
    ("tiers", "words"),
    [
        ([{"type": "memory"}, {"type": "memory"}], "one memory tier"),
        ([NVME, {"type": "memory"}], "memory first"),
        ([NVME, BELOW | {"path": "./a"}], "already used"),
        ([{"type": "memory", "write_mode": "through"}, NVME], "into the table of the tier below memory"),
        ([NVME | {"write_mode": "on_evict"}, BELOW], "needs a memory or nvme tier right above"),
        ([{"type": "memory"}, NVME | {"attach": "always"}], "no tier below to attach from"),
        ([NVME | {"attach": "always"}, BELOW | {"attach": "second"}, BELOW | {"path": "c"}], "one tier"),
        ([NVME | {"attach_min_bytes": 9, "attach_max_bytes": 8}, BELOW], "below attach_min_bytes"),
    ],
    ids=str,
)
def test_tiers_that_do_not_go_together(tiers: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config({"tier": tiers})


@pytest.mark.parametrize(
    "tiers",
    [
        [{"type": "memory"}],
        [NVME, BELOW, BELOW | {"path": "c"}],
        [{"type": "memory"}, NVME | {"write_mode": "on_evict"}, BELOW | {"write_mode": "on_evict"}],
        [{"type": "memory"}, NVME | {"attach": "second", "write_mode": "none"}, BELOW],
        [NVME | {"write_mode": "none"}],
    ],
    ids=str,
)
def test_any_order_of_tiers(tiers: list[dict[str, Any]]) -> None:
    config = parse_config({"tier": tiers})
    assert [tier.type for tier in config.tiers] == [raw["type"] for raw in tiers]
    assert len(set(tier_names(config.tiers))) == len(tiers)


def test_the_read_caches_arena_is_a_bound() -> None:
    tiers = [NVME | {"attach": "always", "attach_staging_bytes": "1MiB"}, BELOW]
    assert attach_staging_bytes(parse_config({"tier": tiers}).tiers) == 2**20
    assert attach_staging_bytes(parse_config({"tier": [NVME, BELOW]}).tiers) == 0


def test_the_keys_of_every_tier_come_from_one_place() -> None:
    """What a tier gets blocks by is the same for all but memory."""
    common = {field.name for field in dataclasses.fields(MediumFields)}
    for tier in (NvmeTierConfig(), SharedFsTierConfig(), ObjectStoreTierConfig(), PoolTierConfig()):
        assert isinstance(tier, MediumFields)
        assert common.isdisjoint(vars(type(tier)).get("__annotations__", {}))


# Files


def write(folder: Path, text: str) -> Path:
    path = folder / "kvstrata.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_whole_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        [store]
        io_deadline_seconds = 2
        queue_bytes = "64MiB"

        [[tier]]
        type = "memory"
        capacity_bytes = "2GiB"
        policy = "arc"

        [[tier]]
        type = "nvme"
        path = "/var/cache/kv"
        direct_io = false

        [metrics]
        port = 9400
        """,
    )
    assert load_config(path) == load_config(str(path)) == Config(
        store=StoreConfig(io_deadline_seconds=2.0, queue_bytes=64 * 2**20),
        tiers=(
            MemoryTierConfig(capacity_bytes=2 * GIB, policy="arc"),
            NvmeTierConfig(path="/var/cache/kv", direct_io=False),
        ),
        metrics=MetricsConfig(port=9_400),
    )  # fmt: skip
    assert isinstance(load_config(path).store.io_deadline_seconds, float)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == Config()


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    with pytest.raises(ConfigError, match=re.escape(f"{path}: no such file; `kvstrata init")):
        load_config(path)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize("text", ["[store", "a = ", "a = 1\na = 2", "[store]\n[store]", "= 3"])
def test_a_syntax_error_names_the_place(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(
        ConfigError, match=rf"{re.escape(str(path))}: not valid TOML: .*(line \d|end of document)"
    ):
        load_config(path)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "kvstrata.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(path)


@given(data=st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "kvstrata.toml"
    path.write_bytes(data)
    try:
        config = load_config(path)
    except ConfigError as error:
        assert str(path) in str(error)
    else:
        assert isinstance(config, Config)


# There and back


def values_of(section: str) -> st.SearchStrategy[dict[str, Any]]:
    """Some good values for some keys of a section."""
    strategies: dict[str, st.SearchStrategy[Any]] = {}
    for key, hint in get_type_hints(SECTIONS[section]).items():
        if key in ("attach_max_bytes", "breaker_failures"):
            continue
        if hint == Words:
            strategies[key] = st.lists(st.text("0123456789abcdef", min_size=1, max_size=64)).map(tuple)
        elif key == "write_mode":
            strategies[key] = st.sampled_from(["back", "through", "none"])
        elif hint == PolicyOptions:
            strategies[key] = st.dictionaries(st.text(max_size=5), st.floats(-1e6, 1e6), max_size=3)
        elif get_args(hint):
            strategies[key] = st.sampled_from(get_args(hint))
        elif hint is bool:
            strategies[key] = st.booleans()
        elif hint is float:
            strategies[key] = st.floats(0.001, 10**6)
        elif hint is int:
            strategies[key] = st.integers(2**20, 2**40) if is_size(key) else st.integers(1, 6)
        elif key in ("path", "capture"):
            strategies[key] = st.just("/cache")
        elif key == "numa":
            strategies[key] = st.sampled_from(["auto", "interleave", "off", "0", "17"])
        else:
            strategies[key] = st.text(max_size=5)
    strategies.pop("io_store_threads", None)
    strategies.pop("io_threads", None)
    return st.fixed_dictionaries({}, optional=strategies)


@given(
    store=values_of("store"),
    metrics=values_of("metrics"),
    vllm=values_of("vllm"),
    memory=st.none() | values_of("memory"),
    nvme=st.none() | values_of("nvme"),
)
def test_to_dict_is_read_back(
    store: dict[str, Any],
    metrics: dict[str, Any],
    vllm: dict[str, Any],
    memory: dict[str, Any] | None,
    nvme: dict[str, Any] | None,
) -> None:
    tiers = [] if memory is None else [{"type": "memory", **memory}]
    below = {"type": "nvme", "path": "/below", "write_mode": "on_evict"}
    tiers += [] if nvme is None else [{"type": "nvme", "path": "/cache", **nvme}, below]
    config = parse_config({"store": store, "metrics": metrics, "vllm": vllm, "tier": tiers})
    assert parse_config(to_dict(config)) == config
    for key, value in store.items():
        assert getattr(config.store, key) == value
    assert [tier.type for tier in config.tiers] == [raw["type"] for raw in tiers]
