"""The arithmetic of the tables, worked out by hand."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_kit import LFU, run_of, twelve_runs

from kvstrata.sim.report import findings
from kvstrata.sim.report.sheets import (
    escape_markdown,
    headline_sheet,
    run_sheet,
    shown,
    to_csv,
    to_markdown,
)
from kvstrata.sim.tables import (
    BYTES,
    FRACTION,
    Cell,
    asked_fractions,
    by_capacity,
    by_trace,
    headline,
    leaf_first_gains,
    pareto_front,
    shortest_in,
    study_of,
    tunings,
    usable_prefix_hits,
)

DEFAULTS = {"lfu_aging": LFU}


def test_headline_by_hand() -> None:
    study = study_of(
        [
            run_of("lru", 0.25, trace="a", prefix=0.2, hit_bytes=100, populated=300, wasted=0.9),
            run_of("lru", 0.75, trace="b", prefix=0.6, hit_bytes=900, populated=100, wasted=0.1),
            run_of("belady", 0.50, trace="a", hit_bytes=200, populated=100, wasted=0.0),
            run_of("belady", 0.80, trace="b", hit_bytes=1000, populated=100, wasted=0.0),
        ]
    )
    oracle, lru = headline(study)
    assert oracle.variant.policy == "belady" and oracle.gap_to_belady == 0
    assert lru.cells == 2
    assert lru.block_hit_ratio == 0.5
    assert lru.usable_prefix_hit_ratio == pytest.approx(0.4)
    assert lru.request_hit_ratio == 0.25
    assert lru.amplification == 400 / 1000
    assert lru.mean_amplification == pytest.approx((300 / 100 + 100 / 900) / 2)
    assert lru.wasted_ratio == pytest.approx(0.5)
    assert lru.gap_to_belady == pytest.approx(0.15)


def test_a_run_without_a_hit_makes_the_mean_amplification_infinite_and_not_the_total() -> None:
    runs = [
        run_of("lru", 0.0, fraction=0.01, populated=50),
        run_of("lru", 0.5, fraction=0.1, populated=150),
    ]
    (row,) = headline(study_of(runs))
    assert row.runs_without_hit == 1
    assert row.mean_amplification == math.inf
    assert row.amplification == 200 / 1000
    (hitless,) = headline(study_of(runs[:1]))
    assert hitless.amplification == math.inf
    assert pareto_front([hitless]) == []


def test_a_policy_that_lacks_a_cell_has_no_mean_and_the_cell_is_named() -> None:
    runs = [run_of(policy, 0.5, trace=trace) for policy in ("lru", "arc", "twoq") for trace in "ab"]
    runs.remove(next(run for run in runs if run.policy == "arc" and run.trace == "b"))
    runs.append(run_of("twoq", 0.9, trace="c"))
    study = study_of(runs)
    comparison = study.comparison()
    assert [row.variant.policy for row in headline(study)] == ["lru", "twoq"]
    assert {row.block_hit_ratio for row in headline(study)} == {0.5}, "the cell that few have is in no mean"
    assert {variant.policy: cells for variant, cells in comparison.missing.items()} == {
        "arc": (Cell("b", 0.01),)
    }
    assert list(comparison.left_out) == [Cell("c", 0.01)]
    said = " ".join(findings.missing(study, ["sieve"]))
    assert "arc has no mean: 1 cell missing, b at 1%" in said
    assert "c at 1%" in said and "No runs of sieve" in said
    table = {variant.policy: row for variant, row in by_capacity(study).items()}
    assert table == {"lru": [0.5], "twoq": [0.5], "arc": [None]}
    assert {variant.policy: row for variant, row in by_trace(study, "b").items()} == {
        "lru": [0.5],
        "twoq": [0.5],
    }


def test_by_capacity_is_a_mean_over_the_traces() -> None:
    runs = [
        run_of("lru", hits, trace=trace, fraction=fraction, prefix=hits / 2)
        for trace, fraction, hits in [("a", 0.01, 0.1), ("b", 0.01, 0.3), ("a", 0.1, 0.5), ("b", 0.1, 0.9)]
    ]
    study = study_of(runs)
    assert study.axis.points == (0.01, 0.1)
    assert next(iter(by_capacity(study).values())) == pytest.approx([0.2, 0.7])
    assert next(iter(by_capacity(study, usable_prefix_hits).values())) == pytest.approx([0.1, 0.35])


def test_pareto_front_by_hand() -> None:
    figures = {
        "lru": (0.7, 400), "arc": (0.7, 500), "twoq": (0.6, 400), "tinylfu_slru": (0.4, 10),
        "sieve": (0.3, 10), "mq": (0.5, 100), "belady": (0.9, 1),
    }  # fmt: skip
    runs = [run_of(name, hits, hit_bytes=100, populated=more) for name, (hits, more) in figures.items()]
    front = [row.variant.policy for row in pareto_front(headline(study_of(runs)))]
    assert front == ["lru", "mq", "tinylfu_slru"]


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=8))
def test_the_front_is_what_nothing_beats(figures: list[tuple[int, int]]) -> None:
    runs = [
        run_of(f"p{number}", hits / 20, hit_bytes=100, populated=more)
        for number, (hits, more) in enumerate(figures)
    ]
    front = {row.variant.policy for row in pareto_front(headline(study_of(runs)))}
    for number, (hits, more) in enumerate(figures):
        beaten = any(h >= hits and m <= more and (h, m) != (hits, more) for h, m in figures)
        assert (f"p{number}" in front) is not beaten


def test_tuning_by_hand() -> None:
    hits = {(1000, 1): 0.54, (10_000, 1): 0.55, (10_000, 2): 0.551, (50_000, 1): 0.56}
    runs = [
        run_of("lfu_aging", ratio, params={"age_every": float(every), "age_shift": float(shift)})
        for (every, shift), ratio in hits.items()
    ]
    study = study_of([*runs, run_of("lru", 0.7)], defaults=DEFAULTS)
    (tuning,) = tunings(study)
    assert tuning.spread == pytest.approx(0.02)
    assert [row.variant.label for row in tuning.rows] == [
        "lfu_aging age_every=50000",
        "lfu_aging age_shift=2",
        "lfu_aging",
        "lfu_aging age_every=1000",
    ]
    assert {effect.knob: (round(effect.largest, 6), effect.pairs) for effect in tuning.effects} == {
        "age_every": (0.02, 3),
        "age_shift": (0.001, 1),
    }
    assert [row.variant.label for row in headline(study)] == ["lru", "lfu_aging"], (
        "the defaults stand for it"
    )
    said = " ".join(findings.tuning(study))
    assert "no variant reaches lru; 14.0 points are missing" in said


def test_without_a_run_of_the_defaults_the_best_variant_stands_for_a_policy_and_is_named() -> None:
    runs = [
        run_of("lfu_aging", hits, params={**LFU, "age_every": every})
        for every, hits in [(1.0, 0.4), (2.0, 0.6)]
    ]
    study = study_of(runs, defaults=DEFAULTS)
    assert [row.variant.label for row in headline(study)] == ["lfu_aging age_every=2"]
    assert "lfu_aging age_every=2" in " ".join(findings.ran(study))


def test_leaf_first_gains_are_over_traces_that_have_both() -> None:
    study = study_of(
        [
            run_of("lru", 0.6, prefix=0.6, trace="a"),
            run_of("lru", 0.9, prefix=0.9, trace="b"),
            run_of("lru_forward", 0.6, prefix=0.45, trace="a"),
        ]
    )
    (gain,) = leaf_first_gains(study)
    assert (gain.point, gain.traces, gain.lru, gain.lru_forward) == (0.01, 1, 0.6, 0.45)
    assert gain.gain == pytest.approx(0.15)


def test_the_last_of_two_equal_runs_counts() -> None:
    study = study_of([run_of("lru", 0.1), run_of("lru", 0.2)])
    assert study.repeated == 1
    assert headline(study)[0].block_hit_ratio == 0.2


def test_two_traces_of_one_name_stay_apart() -> None:
    study = study_of([run_of("lru", 0.1), run_of("lru", 0.2, accesses=3000)])
    assert [facts.name for facts in study.traces] == ["a", "a (2)"]
    assert study.repeated == 0


# Capacities


@pytest.mark.parametrize("fractions", [(0.001, 0.01, 0.05, 0.1, 0.2, 0.4), (0.003, 0.25, 1 / 3)])
def test_fractions_of_traces_of_any_size_become_what_was_asked_for(fractions: tuple[float, ...]) -> None:
    asked = [round(fraction, 4) for fraction in fractions]
    runs = [
        run_of("lru", trace=str(unique), fraction=fraction, unique=unique)
        for unique in (182_790, 70_161, 45_003)
        for fraction in asked
    ]
    study = study_of(runs)
    assert study.axis.kind == FRACTION
    assert study.axis.points == tuple(sorted(asked))


def test_the_words_of_a_capacity_come_before_guessing() -> None:
    runs = [run_of("lru", trace="a", fraction=0.25, unique=30), run_of("lru", trace="b", fraction=0.25)]
    assert asked_fractions(runs) == [0.25, 0.25], "the larger trace tells"
    assert asked_fractions(runs[:1]) == [0.24]
    assert asked_fractions(runs[:1], ["25%"]) == [0.25]
    assert asked_fractions(runs[:1], [""]) == [0.24]


def test_capacities_in_bytes_are_recognised() -> None:
    runs = [
        run_of("lru", trace=str(unique), fraction=blocks / unique, unique=unique)
        for unique in (1009, 5003)
        for blocks in (10, 100)
    ]
    for run in runs:
        object.__setattr__(run, "capacity_bytes", run.capacity_blocks * 2**20)
        object.__setattr__(run, "capacity_blocks", run.capacity_blocks + run.unique_blocks % 7)
    axis = study_of(runs).axis
    assert (axis.kind, axis.label(axis.points[0])) == (BYTES, "10.0 MiB")


@given(st.integers(1, 99_999), st.integers(1, 9), st.integers(1000, 10**7))
def test_shortest_is_in_its_range(digits: int, places: int, unique: int) -> None:
    value = digits / 10**places
    low = int(value * unique) / unique
    if low > 0:
        found = shortest_in(low, low + 1 / unique)
        assert low * (1 - 1e-9) <= found < low + 1 / unique
        mantissa = f"{found:.12e}".split("e")[0].replace(".", "").rstrip("0")
        assert len(mantissa) <= len(str(digits))


# Sentences and sheets


def test_sentences_come_from_the_figures() -> None:
    runs = [run_of(name, hits) for name, hits in [("lru", 0.70), ("arc", 0.695), ("sieve", 0.5)]]
    said = findings.overall(study_of([*runs, run_of("belady", 0.76)]))
    assert (
        said[0]
        == "lru and arc lie within 0.5 points of each other, at a mean block hit ratio of 0.695 to 0.700."
    )
    assert said[1] == "belady, which knows the future, is 6.0 points above lru."
    assert said[2] == "The lowest is sieve with 0.500, 20.0 points below lru."
    said = findings.overall(study_of([run_of("lru", 0.5), run_of("arc", 0.7)]))
    assert said[:2] == [
        "arc has the highest mean block hit ratio, 0.700.",
        "lru follows 20.0 points behind.",
    ]


def test_no_sentence_without_its_figure() -> None:
    alone = study_of([run_of("lru", 0.5)])
    for speak in (findings.tuning, findings.leaf_first, findings.per_trace):
        assert speak(alone) == []
    assert not any("belady" in sentence for sentence in findings.overall(alone))
    nobody = study_of([run_of("lru", trace="a"), run_of("arc", trace="b")])
    assert findings.overall(nobody) == ["No policy has all cells, so no mean can be compared."]
    assert (
        findings.across_capacities(nobody) == findings.two_regimes(nobody) == findings.wasted(nobody) == []
    )


def test_order_of_the_runs_changes_no_figure() -> None:
    runs = twelve_runs()
    mixed = random.Random(1).sample(runs, len(runs))
    one, other = (study_of(order, defaults=DEFAULTS) for order in (runs, mixed))
    assert headline(one) == headline(other)
    assert by_capacity(one) == by_capacity(other)
    assert tunings(one)[0].rows == tunings(other)[0].rows


def test_sheets_as_markdown_and_csv() -> None:
    study = study_of([run_of("lru", 0.0, populated=5), run_of("belady", 0.25)])
    sheet = headline_sheet(study)
    markdown, table = to_markdown(sheet).splitlines(), to_csv(sheet).splitlines()
    assert markdown[0].startswith("| policy | block hit ratio |")
    assert markdown[1].startswith("|---|---:|")
    assert markdown[2].startswith("| belady | 0.250 | 0.250 | - |")
    assert "| ∞ | ∞ |" in markdown[3]
    assert table[1].startswith("belady,0.25,0.25,,")
    assert ",inf,inf," in table[2]
    assert len(run_sheet(study).rows) == 2


def test_names_from_outside_are_no_markdown() -> None:
    assert escape_markdown("a|b\n<i>`*[x]") == "a\\|b \\<i\\>\\`\\*\\[x\\]"


def test_shown() -> None:
    assert [shown("count", 12345), shown("ratio", 0.12345), shown("ratio", None)] == [
        "12,345",
        "0.123",
        "-",
    ]
    assert [shown("amplification", x) for x in (0.0346, 4.1, 3148.3, math.inf)] == [
        "0.0346",
        "4.10",
        "3,148",
        "∞",
    ]
