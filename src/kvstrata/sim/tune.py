"""Variants of a policy's parameters: those of an eviction study, and any grid of them.

The study, of seven policies on thirty traces of KV-cache files, counts 13 variants and names eleven, five
of TinyLFU and six of LFU with aging. The two lines that they should beat, lru and arc, make it thirteen
here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from kvstrata.errors import ConfigError
from kvstrata.policies import POLICIES
from kvstrata.sim.grid import GridRun, study_in_order
from kvstrata.sim.tables import Scores, headline

MAX_VARIANTS = 10_000


@dataclass(frozen=True, slots=True)
class TuneVariant:
    """params: those that differ from the policy's defaults, or are said anyway."""

    name: str
    policy: str
    params: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_line(self) -> bool:
        """Is it there to be beaten?"""
        return self.name in LINES


LINES = ("lru", "arc")
"""Policies without parameters, which the others are compared with."""

STUDY_VARIANTS = (
    *(TuneVariant(name, name) for name in LINES),
    TuneVariant("tinylfu_p10", "tinylfu_slru", {"prob_frac": 0.1, "cms_width": 16_384}),
    TuneVariant("tinylfu_p20", "tinylfu_slru", {"prob_frac": 0.2, "cms_width": 16_384}),
    TuneVariant("tinylfu_p20_w65k", "tinylfu_slru", {"prob_frac": 0.2, "cms_width": 65_536}),
    TuneVariant("tinylfu_p50", "tinylfu_slru", {"prob_frac": 0.5, "cms_width": 16_384}),
    TuneVariant("tinylfu_p80", "tinylfu_slru", {"prob_frac": 0.8, "cms_width": 16_384}),
    TuneVariant("lfu_e1k_s1", "lfu_aging", {"age_every": 1_000, "age_shift": 1}),
    TuneVariant("lfu_e5k_s1", "lfu_aging", {"age_every": 5_000, "age_shift": 1}),
    TuneVariant("lfu_e10k_s1", "lfu_aging", {"age_every": 10_000, "age_shift": 1}),
    TuneVariant("lfu_e10k_s2", "lfu_aging", {"age_every": 10_000, "age_shift": 2}),
    TuneVariant("lfu_e10k_s3", "lfu_aging", {"age_every": 10_000, "age_shift": 3}),
    TuneVariant("lfu_e50k_s1", "lfu_aging", {"age_every": 50_000, "age_shift": 1}),
)
"""With the study's names."""


@dataclass(frozen=True, slots=True)
class TuneRow:
    """Means of one variant over all traces and capacities."""

    variant: TuneVariant
    scores: Scores


def grid_variants(policy: str, settings: Mapping[str, Sequence[float]]) -> list[TuneVariant]:
    """The lines, and the policy with every combination of values. Raises ConfigError."""
    if policy not in POLICIES:
        raise ConfigError(f"policy {policy!r} cannot be tuned; take one of {', '.join(sorted(POLICIES))}")
    if not settings:
        knobs = ", ".join(f"{name} ({value:g})" for name, value in POLICIES[policy].KNOBS.items())
        has = f"; it has {knobs}" if knobs else ": it has no parameter"
        raise ConfigError(f"nothing to tune of {policy}{has}; say --set NAME=VALUE,VALUE")
    names = list(settings)
    count = 1
    for values in settings.values():
        count *= len(values)
    if count > MAX_VARIANTS:
        raise ConfigError(f"{count} variants; take fewer than {MAX_VARIANTS} with --set")
    variants = [TuneVariant(name, name) for name in LINES if name != policy]
    for values in product(*settings.values()):
        params = dict(zip(names, values, strict=True))
        label = " ".join([policy, *(f"{name}={value:g}" for name, value in params.items())])
        variants.append(TuneVariant(label, policy, params))
    return variants


def tune_rows(grid: GridRun, variants: Sequence[TuneVariant]) -> list[TuneRow]:
    """One row per variant, the highest mean block hit ratio first. The grid has run all of them."""
    rows = [
        TuneRow(variant, headline(study_in_order(grid.of(variant.policy, variant.params)))[0])
        for variant in variants
    ]
    return sorted(rows, key=lambda row: -row.scores.block_hit_ratio)


def spreads(rows: Sequence[TuneRow]) -> dict[str, tuple[float, float]]:
    """Per tuned policy the lowest and the highest mean block hit ratio of its variants."""
    found: dict[str, tuple[float, float]] = {}
    for row in rows:
        if not row.variant.is_line:
            ratio = row.scores.block_hit_ratio
            low, high = found.get(row.variant.policy, (ratio, ratio))
            found[row.variant.policy] = min(low, ratio), max(high, ratio)
    return found
