"""The documentation names what the code has: metrics, keys with their defaults, test vectors, files."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata import BlockLayout, BlockStore
from kvstrata.config import (
    Config,
    MediumFields,
    MemoryTierConfig,
    MetricsConfig,
    NvmeTierConfig,
    ObjectStoreTierConfig,
    PoolTierConfig,
    ServeConfig,
    SharedFsTierConfig,
    StoreConfig,
    VllmConfig,
    is_size,
    parse_size,
)
from kvstrata.hashing import canonical, chain_keys, namespace_digest, wrap_keys
from kvstrata.metrics import PREFIX, StoreCollector
from kvstrata.policies import POLICIES, Policy
from kvstrata.policies.belady import Belady
from kvstrata.telemetry import CATALOGUE, HISTOGRAMS
from kvstrata.types import Namespace

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SECTIONS = {
    MediumFields: "tiers.md",
    MemoryTierConfig: "tiers/memory.md",
    NvmeTierConfig: "tiers/nvme.md",
    SharedFsTierConfig: "tiers/shared_fs.md",
    ObjectStoreTierConfig: "tiers/object_store.md",
    PoolTierConfig: "tiers/pool.md",
    StoreConfig: "structures.md",
    MetricsConfig: "metrics.md",
    VllmConfig: "vllm.md",
    ServeConfig: "serve.md",
}
COMMON = {field.name for field in dataclasses.fields(MediumFields)}
FIELDS = [
    (section, field)
    for section in SECTIONS
    for field in dataclasses.fields(section)
    if section is MediumFields or not issubclass(section, MediumFields) or field.name not in COMMON
]
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "CHANGELOG.md"])


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def rows(page: str) -> Iterator[list[str]]:
    """Cells of every table row of a page."""
    for line in read(page).splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("name", [*CATALOGUE, *HISTOGRAMS])
def test_every_metric_is_in_a_table_with_its_labels(name: str) -> None:
    labels, _ = (CATALOGUE | HISTOGRAMS)[name]
    found = [row for row in rows("metrics.md") if f"`{name}`" in row[0]]
    assert len(found) == 1, f"{name} should have one row in docs/metrics.md"
    assert re.findall(r"`(\w+)`", found[0][1]) == list(labels)


def test_every_gauge_is_mentioned() -> None:
    config = Config(tiers=(MemoryTierConfig(capacity_bytes=4096),))
    with BlockStore(config, BlockLayout(4096, 1), Namespace(bytes(32))) as store:
        names = {family.name.removeprefix(PREFIX) for family in StoreCollector(store).collect()}
    text = read("metrics.md")
    missing = [name for name in names if f"`{name}`" not in text and f"`{name}_total`" not in text]
    assert not missing


@pytest.mark.parametrize(("section", "field"), FIELDS, ids=lambda value: getattr(value, "name", ""))
def test_every_key_is_described_with_its_default(section: type, field: dataclasses.Field[object]) -> None:
    page = SECTIONS[section]
    found = [row for row in rows(page) if re.match(rf"`{field.name}`", row[0])]
    if not found:
        assert re.search(rf"`{field.name}` \(default `{re.escape(json.dumps(field.default))}`", read(page))
        return
    assert len(found) == 1, f"{field.name} should have one row in docs/{page}"
    if not found[0][1]:
        assert field.name == "capacity_bytes", f"{field.name}: docs/{page} gives no default"
        return
    value = tomllib.loads("value = " + found[0][1].strip("`"))["value"]
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    value = tuple(value) if isinstance(value, list) else value
    assert (parse_size(value) if is_size(field.name) else value) == default


def test_every_policy_and_parameter_is_described_with_its_default() -> None:
    described = {cells[0].strip("`") for cells in rows("policies.md") if len(cells) == 5}
    assert {*POLICIES, "belady"} <= described
    table = [cells for cells in rows("policies.md") if len(cells) == 4 and cells[1].startswith("`")]
    found = {(cells[0].strip("`"), cells[1].strip("`")): float(cells[2].strip("`")) for cells in table}
    policies: list[type[Policy] | type[Belady]] = [*POLICIES.values(), Belady]
    assert found == {(p.name, name): value for p in policies for name, value in p.KNOBS.items()}


def test_the_vectors_of_keys_md_are_what_the_code_makes() -> None:
    fields = {"model": "tiny", "dtype": "float16", "block_tokens": 4}
    namespace, salted = namespace_digest(fields), namespace_digest(fields, b"tenant-a")
    adapter = chain_keys(namespace, range(10), 4, {0: [("lora", b"adapter-1")]})
    expected = [
        namespace,
        *chain_keys(namespace, range(10), 4),
        *adapter,
        *wrap_keys(namespace, [bytes(32)]),
        salted,
        *chain_keys(salted, range(10), 4),
    ]
    text = read("keys.md")
    assert re.findall(r"`([0-9a-f]{64})`", text) == [digest.hex() for digest in expected]
    assert f"`{canonical(fields).decode()}`" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_code_path_that_is_named_exists(page: Path) -> None:
    for target in re.findall(r"`((?:transfer|policies|connectors|tiers)/[\w/]+\.py)`", page.read_text()):
        assert (ROOT / "src/kvstrata" / target).exists(), f"{page.name}: {target}"
