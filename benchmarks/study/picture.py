"""The picture that the report does not have: shares of the oracle's hits, beside the seed's."""

from __future__ import annotations

import io

import seed
from runs import Group
from tables import scores_by_policy, share_of_oracle

from kvstrata.sim.report.look import GRID, INK, QUIET, look, new_figure, png_of, style_of
from kvstrata.sim.tables import ORACLE

COLORS, REFINED = 256, 2
"""Of a picture's palette: a few lines and their smooth edges need no more. Rounds of refining it."""


def beside_seed(shared: Group, alone: Group) -> bytes:
    """A row per policy: mean block hit ratio over belady's, of the seed, of shared caches, of
    conversations alone. PNG."""
    ours = scores_by_policy(shared)
    single = scores_by_policy(alone) if alone.runs else {}
    policies = [policy for policy in ours if policy != ORACLE]
    with look():
        height = 1.05 + 0.31 * max(1, len(policies))
        figure = new_figure(height)
        axes = figure.add_axes((0.14, 0.55 / height, 0.83, 1 - 1.0 / height))
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        for place, policy in enumerate(policies):
            theirs = seed.POLICIES.get(policy)
            spots = [share_of_oracle(ours, policy), share_of_oracle(single, policy)]
            spots.append(theirs.hit_ratio / seed.ORACLE_HIT_RATIO if theirs else None)
            color = style_of(policy).color
            shown = [x for x in spots if x is not None]
            if shown:
                axes.hlines(place, min(shown), max(shown), color=GRID, linewidth=2.2, zorder=1)
            marks = (
                {"marker": "o", "s": 62, "color": color, "linewidths": 0},
                {"marker": "|", "s": 110, "color": color, "linewidths": 2.2},
                {"marker": "D", "s": 44, "facecolors": "white", "edgecolors": INK, "linewidths": 1.3},
            )
            for x, mark in zip(spots, marks, strict=True):
                if x is not None:
                    axes.scatter(x, place, zorder=3, **mark)  # type: ignore[arg-type]
        axes.axvline(1.0, color=INK, linewidth=1.0, linestyle=(0, (5, 2)))
        axes.set_xlim(0, 1.03)
        axes.set_ylim(len(policies) - 0.4, -0.6)
        axes.set_yticks(range(len(policies)), policies)
        axes.set_xlabel("mean block hit ratio / belady's")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value * 100:.0f}%")
        handles = [
            axes.scatter([], [], marker="D", s=44, facecolors="white", edgecolors=INK, linewidths=1.3),
            axes.scatter([], [], marker="o", s=62, color=QUIET, linewidths=0),
        ]
        names = ["seed", "here, shared caches"]
        if single:
            handles.append(axes.scatter([], [], marker="|", s=110, color=QUIET, linewidths=2.2))
            names.append("here, one conversation alone")
        figure.legend(
            handles, names, loc="upper center", ncols=3, frameon=False, fontsize=8.5,
            bbox_to_anchor=(0.555, 1.0),
        )  # fmt: skip
    return png_of(figure)


def smaller(png: bytes) -> bytes:
    """The picture with a palette, which takes about a third."""
    from PIL import Image  # noqa: PLC0415 (comes with matplotlib)

    out = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        # By coverage: the colour of one small mark must not go down among the greys.
        palette = image.convert("RGB").quantize(
            COLORS, method=Image.Quantize.MAXCOVERAGE, kmeans=REFINED, dither=Image.Dither.NONE
        )
        palette.save(out, format="PNG", optimize=True)
    return out.getvalue()
