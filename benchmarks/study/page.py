"""The pages of the study: its README with tables and pictures, and its CSV files. Runs in, files out.

Every sentence with a figure is made from the figures. The other sentences say what was done and why it
matters, and hold whatever the figures are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import seed
from picture import beside_seed, smaller
from runs import Group, StudyRuns
from tables import (
    beside_seed_sheet,
    chance,
    choice_counts,
    choice_sheet,
    choices,
    claim_sheet,
    length_sheet,
    scores_by_policy,
    scores_sheet,
    seed_sheet,
    setup_sheet,
    variant_sheets,
    without,
)

from kvstrata.sim.advise import BANDWIDTH, LATENCY
from kvstrata.sim.report import findings
from kvstrata.sim.report.findings import listed, points
from kvstrata.sim.report.look import png_of
from kvstrata.sim.report.page import render_page, sections_of, sheets_of
from kvstrata.sim.report.pictures import Picture, capacity_lines, draw_all
from kvstrata.sim.report.sheets import (
    Sheet,
    capacity_sheets,
    escape_markdown,
    headline_sheet,
    leaf_first_sheet,
    to_csv,
    to_markdown,
    trace_sheet,
    tuning_sheets,
)
from kvstrata.sim.tables import ORACLE, Scores, Study, block_hits, by_trace

MARK = "<!-- made by `make study`; what is written here by hand is lost -->"
TITLE = "Which policy should hold KV-cache traffic?"
TABLES, PICTURES, REPORT, PAGE = "tables", "pictures", "report.html", "README.md"
REPORT_BYTES = 1_500_000
"""A larger page is not written."""
SHOWN = 5e-4
"""What is less is nought in the tables."""
SEEN_SHARE, SAME_RATIO = 1e-4, 0.005
"""Where the picture of miss ratios starts, and how far apart lines must be to be seen."""


def make_files(runs: StudyRuns) -> dict[str, bytes]:
    """All files of the study by their path in its folder. Raises ConfigError for a missing package."""
    study = runs.shared.study()
    drawn = draw_all(study, runs.curves)
    pictures = {picture.name: replace(picture, png=smaller(picture.png)) for picture in drawn}
    pictures["beside-seed"] = Picture(
        "beside-seed", "beside-seed", "Share of belady's hits, beside the seed's",
        "Per policy: mean block hit ratio over belady's, of the seed, of shared caches and of "
        "conversations alone.",
        smaller(beside_seed(runs.shared, runs.alone)),
    )  # fmt: skip
    if runs.alone.runs:
        lines = capacity_lines(runs.alone.study(), block_hits, "block hit ratio")
        pictures["alone"] = Picture(
            "alone", "alone", "Block hit ratio of conversations alone",
            "Lines of the mean block hit ratio by capacity, each conversation with a cache to itself.",
            smaller(png_of(lines)),
        )  # fmt: skip
    page = render_page(
        sections_of(study, [pictures[picture.name] for picture in drawn], _notes(runs)), TITLE
    ).encode()
    files = {f"{PICTURES}/{name}.png": picture.png for name, picture in pictures.items()}
    files |= {f"{TABLES}/{sheet.key}.csv": to_csv(sheet).encode() for sheet in _csv_sheets(runs)}
    if len(page) <= REPORT_BYTES:
        files[REPORT] = page
    return files | {PAGE: _Page(runs, pictures, REPORT in files).text().encode()}


def _notes(runs: StudyRuns) -> list[str]:
    notes = [
        "One part of `make study`: the caches that many users share. README.md beside this file is all."
    ]
    if not runs.capture.runs:
        notes.append("No capture of a live store was there.")
    return notes


def _csv_sheets(runs: StudyRuns) -> list[Sheet]:
    """Those of shared caches are named as in the report. Seconds differ every time and are out."""
    sheets = [without(sheet, "seconds") for sheet in sheets_of(runs.shared.study())]
    sheets += [beside_seed_sheet(runs.shared), *variant_sheets(runs), setup_sheet(runs)]
    sheets += [claim_sheet([runs.shared, runs.alone]), choice_sheet(choices(runs.shared))]
    sheets.append(seed_sheet(runs.seeds))
    for start, group in (("alone-", runs.alone), ("capture-", runs.capture)):
        if group.runs:
            study = group.study()
            of = [trace_sheet(study), headline_sheet(study), *capacity_sheets(study)]
            of += [*tuning_sheets(study), leaf_first_sheet(study)]
            sheets += [replace(sheet, key=start + sheet.key) for sheet in of]
    return [sheet for sheet in sheets if sheet.rows]


class _Page:
    """The README, section by section."""

    def __init__(self, runs: StudyRuns, pictures: dict[str, Picture], report: bool) -> None:
        self._runs = runs
        self._pictures = pictures
        self._report = report
        self._study = runs.shared.study()
        self._lines: list[str] = [MARK, ""]

    def text(self) -> str:
        for section in (
            self._head, self._setup, self._policies, self._claims, self._capacities, self._regimes,
            self._tuning, self._alone, self._why, self._advice, self._chance, self._capture, self._repeat,
        ):  # fmt: skip
            section()
        return "\n".join(self._lines).rstrip() + "\n"

    # Pieces

    def _say(self, *paragraphs: str) -> None:
        for paragraph in paragraphs:
            self._lines += [paragraph, ""]

    def _list(self, sentences: Sequence[str]) -> None:
        if sentences:
            self._lines += [*(f"- {sentence}" for sentence in sentences), ""]

    def _found(self, sentences: Sequence[str]) -> None:
        """Sentences from elsewhere, which may hold anything."""
        self._list([escape_markdown(sentence) for sentence in sentences])

    def _table(self, sheet: Sheet) -> None:
        if sheet.rows:
            self._lines += to_markdown(sheet).splitlines()
            self._lines.append("")

    def _picture(self, name: str) -> None:
        if name in self._pictures:
            picture = self._pictures[name]
            self._say(f"![{escape_markdown(picture.title)}]({PICTURES}/{name}.png)")

    # Sections

    def _head(self) -> None:
        self._say(
            f"# {TITLE}",
            f"An eviction study started kvstrata: {seed.TITLE}, called *the seed* below. It replayed what "
            f""
            f""
            "LLM servers did to cache files on Lustre with PCC. This is the same study on other traffic: "
            "requests of real users, whose blocks form prefix chains, through policies that are the very "
            "code of the live store.",
            "`make study` makes this page, and every sentence with a figure in it from the figures.",
            "## In short",
        )
        shared = scores_by_policy(self._runs.shared)
        said = [" ".join(_leaders(self._study))]
        said += _lru_orders(shared)
        said += findings.two_regimes(self._study)[1:2]
        said += [_stranded(shared)] if _stranded(shared) else []
        said += _advice_counts(self._runs)
        if self._runs.alone.runs:
            alone = " ".join(_leaders(self._runs.alone.study()))
            said.append(f"One conversation with a cache of its own: {alone}")
        rows = claim_sheet([self._runs.shared]).rows
        if rows:
            held = sum(row[3] == "yes" for row in rows)
            said.append(f"Of the {len(rows)} statements of the seed that can be tested here, {held} hold.")
        self._found(said)

    def _setup(self) -> None:
        self._say("## What was run")
        self._table(setup_sheet(self._runs))
        self._say(
            "*Shared caches*: Mooncake's log of a chat service, and recorded agentic conversations as "
            "one "
            "multi-tenant stream, at two block sizes. These are what a store would hold, and the "
            "headline "
            "is about them. *Alone*: each of these conversations, with a cache of its own. Means give "
            "every trace and every capacity equal weight, as the seed's do; the stream, at two block "
            "sizes, weighs twice.",
        )
        self._table(length_sheet(self._runs))
        self._say(
            "*Reuse* is the share of accesses to blocks that were seen before: no policy can hit more. "
            "*Hits* is the block hit ratio, what the seed calls hit ratio. *Usable prefix* counts only "
            "the "
            "unbroken run of hits from a request's first block; an engine can use no other. *Gap* is "
            "belady's hits minus the policy's; *of belady* is their quotient. *Amplification* is bytes "
            "populated / bytes hit. Capacities are shares of the unique blocks of each trace."
        )
        if self._runs.alone.left_out:
            self._say(
                f"Left out: {self._runs.alone.left_out:,} runs of conversations alone whose share makes "
                f"no "
                "whole block; the smallest cache, one block, would be more than was asked for."
            )

        self._found(_twins(self._runs.alone))

    def _policies(self) -> None:
        self._say("## The policies, beside the seed's", "Shared caches; means over traces and capacities.")
        self._table(beside_seed_sheet(self._runs.shared))
        self._say(
            "The seed has one LRU, taken here for the plain one, which touches blocks in the order of "
            "the accesses: our `lru_forward`. Its figures stand beside `lru` too, which touches leaves "
            "first. Our amplification is total populated / "
            "total hit bytes, the seed's a mean; why is told "
            "[below](#what-differs-from-the-seed-and-why)."
        )
        self._picture("beside-seed")
        self._found([said for said in findings.overall(self._study) if said not in _leaders(self._study)])

    def _claims(self) -> None:
        sheet = claim_sheet([self._runs.shared, self._runs.alone])
        if not sheet.rows:
            return
        self._say("## What of the seed holds here")
        self._lines += to_markdown(sheet).replace("| no |", "| **no** |").splitlines()
        self._lines.append("")
        self._say(
            "*Ahead* and *behind*: of the best of ARC, plain LRU and 2Q, whose mean block hit ratios are "
            "compared here as they were there; in the last two rows, of plain LRU. A statement holds if "
            "it does "
            "within the digits of the tables.",
        )

    def _capacities(self) -> None:
        hits, prefixes = capacity_sheets(self._study)
        self._say("## Across capacities", "Shared caches; block hit ratio, mean over the traces:")
        self._table(hits)
        self._picture("hit-ratio")
        self._found(findings.across_capacities(self._study))
        self._say("Usable prefix:")
        self._table(prefixes)
        self._say("Trace by trace:")
        self._picture("traces")
        self._found(findings.per_trace(self._study))
        self._say("LRU at every capacity, from one pass over each trace:")
        self._picture("miss-ratio")
        self._found(_same_curves(self._runs))

    def _regimes(self) -> None:
        self._say("## Two regimes: hits against amplification")
        self._picture("regimes")
        self._found([*findings.two_regimes(self._study), *findings.wasted(self._study)])

    def _tuning(self) -> None:
        sheets = variant_sheets(self._runs)
        if not sheets:
            return
        self._say("## Tuning", "The seed's variants of its two outliers, by the seed's names.")
        for sheet in sheets:
            self._table(sheet)
        self._picture("tuning")
        self._found(findings.tuning(self._study))

    def _alone(self) -> None:
        if not self._runs.alone.runs:
            return
        study = self._runs.alone.study()
        self._say(
            "## One conversation alone",
            "A conversation asks for nearly all it has said, again and again, and a bit more each time: "
            "one chain that grows. A cache for a share of that is shorter than most requests, so "
            "whatever "
            "is touched first is pushed out before the request ends. It is hard traffic for policies "
            "that go from root to leaf, and it is what each session looks like when a store is "
            "much too small.",
        )
        self._table(scores_sheet(self._runs.alone, "alone", "Alone"))
        self._picture("alone")
        self._found([*findings.overall(study), *findings.per_trace(study)])
        self._found(_long_requests(self._runs, self._runs.alone, "conversations")[-1:])

    def _why(self) -> None:
        self._say("## What differs from the seed, and why")
        shared, alone = scores_by_policy(self._runs.shared), scores_by_policy(self._runs.alone)
        self._say(
            "**Other traces.** The seed captured what one model and phase after the other did to files. "
            "Ours are requests of users, and each trace has its own bound: what is asked for once cannot "
            "hit. "
            "So absolute hit ratios tell of the traces; gaps and shares of belady tell of the policies."
        )
        self._found(_bounds(self._runs))
        self._say(
            "**Leaf first.** A request uses its blocks from the root on, so the root is worth most, and "
            "a "
            "plain LRU, which touches the root first, lets it go first. `lru` touches from the leaf to "
            "the "
            "root. The seed tells of no such order."
        )
        self._found([*findings.leaf_first(self._study), *_lru_orders(shared)])
        self._table(leaf_first_sheet(self._study))
        self._say(
            "**Usable prefix.** The seed counts every hit. An engine must compute all that follows the "
            "first missing block, so a hit behind it saves nothing. Policies that keep single blocks for "
            "their frequency, or let newcomers pass through a small queue, tear holes into chains."
        )
        self._found([sentence for sentence in (_stranded(shared), _stranded(alone, "Alone, ")) if sentence])
        self._say(
            "**Requests longer than the cache.** A small share may be less than one request, and then "
            "all that goes from root to leaf evicts its own beginning."
        )
        self._found(_long_requests(self._runs, self._runs.shared, "shared traces"))
        aging = _aging(self._runs)
        if aging:
            self._say(
                "**Aging.** `lfu_aging` counts in accesses, and one agentic request is many of them. If "
                "counters are halved once in a few requests they hardly tell old from new, and what is "
                "left to decide is recency: LFU turns into plain LRU. How many accesses of the seed make "
                "a request, and so how fast its LFU forgot, it does not say."
            )
            self._found(aging)
        sketch = _sketch(self._runs)
        if sketch:
            self._say(
                "**The sketch.** TinyLFU's counters fill up where a trace has many more blocks than a "
                "row "
                "has counters; then it can tell nobody apart and hardly admits. The same stream with "
                "blocks four times as long has a quarter of the blocks. And counters are halved after a "
                "number of accesses per block that fits, so a larger cache waits longer and fills them "
                "more."
            )
            self._found(sketch)
        self._say(
            "**Amplification.** The seed gives the mean of the runs' ratios. Where a tiny cache has "
            "hardly "
            "a hit the ratio is huge, so here the mean tells of the smallest caches alone; the tables "
            "and "
            "the picture give totals. [headline.csv](tables/headline.csv) has both."
        )
        self._found(_amplifications(shared))
        self._say(
            "**The same.** Capacities are shares of what a trace touches, every run starts empty, every "
            "block may be admitted, all traces weigh the same, and the variants are the seed's."
        )

    def _advice(self) -> None:
        found = choices(self._runs.shared)
        if not found:
            return
        self._say(
            "## What to do with it",
            "What the rules of `kvstrata sim advise` take on each shared trace at each capacity, with "
            "its "
            "usable-prefix hit ratio and amplification. *Latency*: the most usable prefix; among equals "
            "the least writing, then the simplest. *Bandwidth*: the least amplification that keeps half "
            "of "
            "the highest usable prefix.",
        )
        self._table(choice_sheet(found))
        said = []
        for bottleneck, when in (
            (LATENCY, "Where requests wait for hits"),
            (BANDWIDTH, "Where the storage below cannot keep up with what is populated"),
        ):
            counts, cells = choice_counts(found, bottleneck)
            rest = [f"{policy} in {count}" for policy, count in counts[1:]]
            first, often = counts[0]
            also = f" ({listed(rest)})" if rest else ""
            said.append(f"{when}: **{first}**, in {often} of {cells} cells{also}.")
        self._list(said)
        self._say(
            "Start with the first. Look at the second only where links or write endurance are what is "
            "short, and mind the usable prefix that it gives up. Then see where the curves above bend: "
            "more capacity than that brings little. Your own traffic decides: `kvstrata sim advise TRACE "
            "--bottleneck latency` ([docs](../commands/sim.md)). A "
            "live store writes such a trace if its configuration names a folder "
            "([capture](../traces.md#capture))."
        )

    def _chance(self) -> None:
        sheet = seed_sheet(self._runs.seeds)
        if not sheet.rows:
            return
        self._say(
            "## How far chance goes",
            "The stream puts conversations in a random order and draws when they start. Mean block hit "
            "ratio of the stream of the coarser blocks in several such orders, the first being the one "
            "above:",
        )
        self._table(sheet)
        self._found(_chances(sheet))

    def _capture(self) -> None:
        self._say("## Traffic that a live store recorded")
        if not self._runs.capture.runs:
            self._say(
                "None was there. `make demo` runs a real vLLM on kvstrata and leaves a capture in "
                "`.demo/capture`; the next `make study` adds it here. It is in no mean above."
            )
            return
        study = self._runs.capture.study()
        self._say(
            "`make demo` runs a real vLLM with kvstrata under it, and the store records what it is asked "
            "for. This is that traffic. It is small and shows that the road from a live store to this "
            "page "
            "is there; it is in no mean above. Shares that make no whole block are left out."
        )
        self._table(without(trace_sheet(study), "runs"))
        self._table(capacity_sheets(study)[1])
        self._say("Usable-prefix hit ratio by capacity.")
        self._found(findings.across_capacities(study))

    def _repeat(self) -> None:
        self._say("## Once more")
        self._say(
            "```\nmake study                  # real traces in ../shared/traces/open\n"
            "make study TRACES=DIR       # or DIR/mooncake/*.jsonl.gz and DIR/agentic/*.json.gz\n```",
            "It takes minutes at most, and can be interrupted: what was run is kept in `.demo/study`. "
            "The "
            "same traces and code give the same files.",
        )
        report = (
            f"[{REPORT}]({REPORT}) is the report of the shared caches as one page. " if self._report else ""
        )
        self._say(
            f"{report}All tables lie in [{TABLES}]({TABLES}) as CSV with all digits, "
            f"[{TABLES}/runs.csv]({TABLES}/runs.csv) has every run on the shared caches. How runs are "
            "counted is in [simulator.md](../simulator.md), what each policy does in "
            "[policies.md](../policies.md)."
        )


# Sentences made from figures


def _leaders(study: Study) -> list[str]:
    """Who is ahead, and how far belady is."""
    rest = ("The lowest is", "Of what an engine can use", "No policy")
    return [
        said
        for said in findings.overall(study)
        if not said.startswith(rest) and "behind a missing block" not in said
    ]


def _lru_orders(scores: dict[str, Scores]) -> list[str]:
    if not {"lru", "lru_forward", "arc", "twoq"} <= scores.keys():
        return []
    hits = {policy: row.block_hit_ratio for policy, row in scores.items()}
    tied = sorted(("arc", "lru_forward", "twoq"), key=lambda policy: -hits[policy])
    gain = hits["lru"] - hits[tied[0]]
    word = "above" if gain >= 0 else "below"
    return [
        f"arc, lru_forward and twoq, which the seed found tied, lie within "
        f"{points(hits[tied[0]] - hits[tied[-1]])} of each other; lru, leaf first, is {points(gain)} "
        f"{word} the best of them."
    ]


def _stranded(scores: dict[str, Scores], start: str = "") -> str:
    """How much of its hits each policy cannot use, those that lose the most first."""
    lost = {
        policy: row.block_hit_ratio - row.usable_prefix_hit_ratio
        for policy, row in scores.items()
        if policy != ORACLE
    }
    most = [
        policy for policy in sorted(lost, key=lambda policy: -lost[policy])[:3] if lost[policy] >= SHOWN
    ]
    if not most:
        return ""
    named = listed([f"{policy} ({points(lost[policy])})" for policy in most])
    none = [policy for policy in ("lru", ORACLE) if policy in scores and lost.get(policy, 0.0) < SHOWN]
    rest = f"; {listed(none)} lose{'s' if len(none) == 1 else ''} nothing" if none else ""
    lose = "loses" if len(most) == 1 else "lose"
    return f"{start}{named} {lose} the most to hits behind a missing block{rest}."


def _advice_counts(runs: StudyRuns) -> list[str]:
    found = choices(runs.shared)
    if not found:
        return []
    (latency, often), *_ = choice_counts(found, LATENCY)[0]
    (bandwidth, seldom), *_ = choice_counts(found, BANDWIDTH)[0]
    cells = choice_counts(found, LATENCY)[1]
    return [
        f"Which one: where requests wait for hits, sim advise takes {latency} in {often} of {cells} "
        f"cells; "
        f"where the storage below cannot keep up, {bandwidth} in {seldom}."
    ]


def _twins(group: Group) -> list[str]:
    """Traces that no run can tell apart."""
    facts: dict[str, list[object]] = {}
    for cell, run in group.runs:
        figures = (run.requests, run.accesses, run.unique_blocks, run.hit_bytes, run.populated_bytes)
        facts.setdefault(cell.trace.name, []).append((cell.policy, cell.params, cell.capacity, figures))
    return [
        f"{one} and {other} give equal figures in every run: to a cache they are one conversation."
        for one, other in combinations(facts, 2)
        if facts[one] == facts[other]
    ]


def _bounds(runs: StudyRuns) -> list[str]:
    study = runs.shared.study()
    said = []
    for facts in study.traces:
        last = {v.policy: row[-1] for v, row in by_trace(study, facts.name).items()}
        hits = [f"{policy} hits {last[policy]:.3f}" for policy in (ORACLE, "lru") if last.get(policy)]
        if hits:
            largest = study.axis.label(study.axis.points[-1])
            said.append(f"{facts.name}: reuse {facts.reuse:.3f}; at {largest} {listed(hits)}.")
    return said


def _long_requests(runs: StudyRuns, group: Group, name: str) -> list[str]:
    """By capacity, how many traces have requests that are longer than the cache."""
    study = group.study()
    said = []
    for point in study.axis.points:
        sizes = {facts.name: max(1, int(point * facts.unique_blocks)) for facts in study.traces}
        longest = [trace for trace, size in sizes.items() if runs.lengths[trace].longest > size]
        median = [trace for trace, size in sizes.items() if runs.lengths[trace].median > size]
        if longest:
            said.append(
                f"At {study.axis.label(point)} the longest request is longer than the cache on "
                f"{len(longest)} of {len(sizes)} {name}, the median request on {len(median)}."
            )
    return said


def _same_curves(runs: StudyRuns) -> list[str]:
    """Curves of which only one can be seen."""
    said = []
    for one, other in combinations(runs.curves, 2):
        shares = [share for share in one.fractions if share >= SEEN_SHARE]
        apart = np.interp(shares, one.fractions, one.miss_ratios)
        apart = apart - np.interp(shares, other.fractions, other.miss_ratios)
        if np.abs(apart).max() < SAME_RATIO:
            said.append(f"The curves of {one.trace} and {other.trace} lie on each other.")
    return said


def _chances(sheet: Sheet) -> list[str]:
    if sum(row[0] != ORACLE for row in sheet.rows) < 2:
        return []
    found = chance(sheet)
    said = [
        f"From order to order the mean of all policies moves by {points(found.shift)}, for all of them "
        "together: compare within a column.",
        f"{found.best} leads in {found.led} of {found.orders} orders; its distance to the best other is "
        f"{found.leads[0] * 100:+.1f} to {found.leads[1] * 100:+.1f} points.",
    ]
    if found.swapped:
        pairs = "; ".join(f"{one} with {other}" for one, other in found.swapped)
        said.append(f"Neighbours that some order swaps, and so equals as far as this tells: {pairs}.")
    return said


def _aging(runs: StudyRuns) -> list[str]:
    rows = [sheet for sheet in variant_sheets(runs) if sheet.key.endswith("lfu_aging")]
    if not rows:
        return []
    named = {str(row[0]): row for row in rows[0].rows}
    often, rare = named["lfu_e1k_s1"], named["lfu_e50k_s1"]
    plain = scores_by_policy(runs.shared).get("lru_forward")
    beside = f"; lru_forward has {plain.block_hit_ratio:.3f}" if plain else ""
    return [
        f"Aged every {often[1]} accesses it has {often[4]:.3f}, every {rare[1]} accesses {rare[4]:.3f}"
        f"{beside}. In the seed it is {often[3]:.3f} and {rare[3]:.3f}."
    ]


def _sketch(runs: StudyRuns) -> list[str]:
    study = runs.shared.study()
    said = []
    for facts in study.traces:
        means: dict[float, float] = {}
        for variant, cells in study.runs.items():
            of_trace = [run.block_hit_ratio for cell, run in cells.items() if cell.trace == facts.name]
            params = dict(variant.params)
            if variant.policy == "tinylfu_slru" and of_trace and params["prob_frac"] == 0.2:
                means[params["cms_width"]] = sum(of_trace) / len(of_trace)
        if len(means) == 2:
            narrow, wide = sorted(means)
            said.append(
                f"{facts.name}, {facts.unique_blocks:,} unique blocks: mean hit ratio "
                f"{means[narrow]:.3f} with {narrow:,.0f} counters, {means[wide]:.3f} with {wide:,.0f}."
            )
        table = {v.policy: row for v, row in by_trace(study, facts.name).items() if not v.changed}
        row = [value for value in table.get("tinylfu_slru", ()) if value is not None]
        if row and row[-1] < max(row) - SAME_RATIO:
            best = row.index(max(row))
            said.append(
                f"{facts.name}: {row[best]:.3f} at {study.axis.label(study.axis.points[best])}, but "
                f"{row[-1]:.3f} at {study.axis.label(study.axis.points[-1])}."
            )
    return said


def _amplifications(scores: dict[str, Scores]) -> list[str]:
    said = []
    for policy in ("lru", "lru_forward", "tinylfu_slru"):
        if policy in scores:
            row = scores[policy]
            said.append(
                f"{policy}: total {findings.amplification(row.amplification)}, "
                f"mean {findings.amplification(row.mean_amplification)}."
            )
    return said
