"""Variants of parameters, and their means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sim_kit import random_tree_chains, trace_of

from kvstrata.errors import ConfigError
from kvstrata.policies import POLICIES
from kvstrata.sim.grid import run_grid
from kvstrata.sim.specs import trace_specs
from kvstrata.sim.tune import STUDY_VARIANTS, TuneVariant, grid_variants, spreads, tune_rows
from kvstrata.traces.parquet import write_parquet


def test_the_variants_of_the_study() -> None:
    assert len(STUDY_VARIANTS) == len({variant.name for variant in STUDY_VARIANTS}) == 13
    assert [variant.name for variant in STUDY_VARIANTS if variant.is_line] == ["lru", "arc"]
    by_policy = [variant.policy for variant in STUDY_VARIANTS]
    assert (by_policy.count("tinylfu_slru"), by_policy.count("lfu_aging")) == (5, 6)


@pytest.mark.parametrize("variant", STUDY_VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_of_the_study_can_be_made(variant: TuneVariant) -> None:
    if variant.policy not in POLICIES:
        pytest.skip(f"{variant.policy} is not among the policies")
    assert POLICIES[variant.policy](100, 50, **variant.params).capacity == 50


def test_any_grid() -> None:
    variants = grid_variants("twoq", {"kin": [0.1, 0.5], "kout": [0.5, 1.0, 2.0]})
    assert len(variants) == 2 + 6
    assert variants[2].name == "twoq kin=0.1 kout=0.5" and variants[-1].params == {"kin": 0.5, "kout": 2.0}
    assert [variant.name for variant in grid_variants("arc", {"x": [1.0]})] == ["lru", "arc x=1"]
    with pytest.raises(ConfigError, match=r"it has kin \(0\.25\)"):
        grid_variants("twoq", {})
    with pytest.raises(ConfigError, match="belady"):
        grid_variants("belady", {"forced": [1.0]})
    with pytest.raises(ConfigError, match="variants"):
        grid_variants("twoq", {"kin": [0.1] * 200, "kout": [0.5] * 200})


def test_means_over_capacities(tmp_path: Path) -> None:
    trace = trace_of(random_tree_chains(np.random.default_rng(3), 300, 600))
    write_parquet(trace, tmp_path / "small.parquet")
    variants = grid_variants("twoq", {"kin": [0.1, 0.5]})
    specs = trace_specs([tmp_path / "small.parquet"])
    grid = run_grid(specs, [(one.policy, one.params) for one in variants], ["1%", "10%", "30%"], jobs=1)
    rows = tune_rows(grid, variants)
    assert [row.scores.cells for row in rows] == [3] * 4
    ratios = {row.variant.name: row.scores.block_hit_ratio for row in rows}
    lru = [run.block_hit_ratio for run in grid.results if run.policy == "lru"]
    assert ratios["lru"] == pytest.approx(sum(lru) / 3)
    assert list(ratios.values()) == sorted(ratios.values(), reverse=True)
    low, high = spreads(rows)["twoq"]
    assert {low, high} == {ratios["twoq kin=0.1"], ratios["twoq kin=0.5"]} and list(spreads(rows)) == [
        "twoq"
    ]
