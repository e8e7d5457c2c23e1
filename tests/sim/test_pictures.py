"""Pictures are PNGs of the right size that name every policy."""

from __future__ import annotations

import builtins
import itertools
import struct
import sys
from collections.abc import Callable
from typing import Any

import pytest
from report_kit import LFU, TWELVE, run_of, twelve_runs

from kvstrata.errors import ConfigError
from kvstrata.sim.report import pictures
from kvstrata.sim.report.look import DOTS_PER_INCH, STYLES, WIDTH_INCHES, style_of
from kvstrata.sim.report.pictures import MissCurve, draw_all
from kvstrata.sim.tables import Study, block_hits, headline, study_of

pytest.importorskip("matplotlib", reason="pip install 'kvstrata[sim]'")

PIXELS = round(WIDTH_INCHES * DOTS_PER_INCH)


@pytest.fixture(scope="module")
def study() -> Study:
    return study_of(twelve_runs(), defaults={"lfu_aging": LFU})


def size_of(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def words_of(figure: Any) -> str:
    from matplotlib.text import Text

    return " ".join(text.get_text() for text in figure.findobj(Text))


def test_all_pictures_are_drawn(study: Study) -> None:
    seen: list[tuple[int, int]] = []
    curve = MissCurve("trace-0", [0.001, 0.01, 0.1, 1.0], [0.9, 0.8, 0.5, 0.3])
    drawn = draw_all(study, [curve], lambda done, total: seen.append((done, total)))
    assert [picture.name for picture in drawn] == [
        "hit-ratio", "usable-prefix", "headline", "regimes", "wasted", "tuning", "traces", "miss-ratio",
    ]  # fmt: skip
    for picture in drawn:
        width, height = size_of(picture.png)
        assert width == PIXELS
        assert 150 < height < 3 * PIXELS
        assert len(picture.png) > 5000
        assert picture.alt and picture.title
    assert seen == [(done, len(drawn)) for done in range(len(drawn))]


@pytest.mark.parametrize(
    "draw",
    [
        lambda study: pictures.capacity_lines(study, block_hits, "block hit ratio"),
        lambda study: pictures.headline_bars(headline(study)),
        lambda study: pictures.regimes(headline(study)),
        lambda study: pictures.wasted_bars(headline(study)),
        lambda study: pictures.trace_multiples(study, ["trace-0", "trace-1"]),
    ],
    ids=["lines", "headline", "regimes", "wasted", "traces"],
)
def test_every_policy_is_named(study: Study, draw: Callable[[Study], Any]) -> None:
    words = words_of(draw(study))
    missing = [policy for policy in (*TWELVE, "belady") if policy not in words]
    assert not missing


def test_where_policies_crowd_it_is_enlarged(study: Study) -> None:
    crowded = pictures.regimes(headline(study))
    assert len(crowded.axes) == 2
    assert words_of(crowded).count("lru_forward") == 1, "named once, where it is enlarged"
    figures = [("lru", 0.2), ("arc", 0.4), ("twoq", 0.6), ("mq", 0.8), ("belady", 0.9)]
    apart = study_of([run_of(policy, hits) for policy, hits in figures])
    assert len(pictures.regimes(headline(apart)).axes) == 1


def test_the_tuning_picture_names_every_variant(study: Study) -> None:
    words = words_of(pictures.tuning_spread(study))
    assert "age_every 10000 (default)" in words
    assert "age_every 1000" in words and "age_every 50000" in words and "age_shift" not in words


def test_no_words_are_cut_off_at_the_edge(study: Study) -> None:
    from matplotlib.text import Text

    for figure in (
        pictures.capacity_lines(study, block_hits, "block hit ratio"),
        pictures.headline_bars(headline(study)),
        pictures.regimes(headline(study)),
        pictures.wasted_bars(headline(study)),
        pictures.tuning_spread(study),
    ):
        pictures.png_of(figure)
        ticks = [
            label
            for axes in figure.axes
            for of in (axes.get_xticklabels, axes.get_yticklabels)
            for label in of(which="both")
        ]
        for text in figure.findobj(Text):
            if text.get_text() and text.get_visible():
                box = text.get_window_extent()
                number = text in ticks and text.get_text()[0].isdigit()
                if not number:  # those beyond the end of an axis are there and not drawn
                    assert box.x0 >= -1 and box.x1 <= figure.bbox.width + 1, text.get_text()
                    assert box.y0 >= -1 and box.y1 <= figure.bbox.height + 1, text.get_text()


def test_every_policy_has_a_look_of_its_own() -> None:
    for one, other in itertools.combinations(STYLES, 2):
        assert STYLES[one].color != STYLES[other].color
        assert STYLES[one].marker != STYLES[other].marker or "" in (
            STYLES[one].marker,
            STYLES[other].marker,
        )
    assert set(TWELVE) < set(STYLES)
    assert style_of("somebody_elses") == style_of("somebody_elses")


def test_the_same_runs_give_the_same_bytes(study: Study) -> None:
    assert [picture.png for picture in draw_all(study)] == [picture.png for picture in draw_all(study)]


@pytest.mark.parametrize(
    "runs",
    [
        [run_of("lru", 0.5)],
        [run_of("belady", 0.5)],
        [run_of("lru", 0.0, populated=0, wasted=None)],
        [run_of("lru", 0.0), run_of("arc", 0.0)],
        [run_of("lru", 1.0, populated=0, wasted=None)],
        [run_of("lru", trace="a"), run_of("arc", trace="b")],
        [run_of("lru", trace="$x^2$ \u65e5 " + "n" * 200)],
    ],
    ids=["one", "oracle", "nothing", "no-hits", "all-hits", "nothing-shared", "odd-name"],
)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_pictures_of_little(runs: list[Any]) -> None:
    for picture in draw_all(study_of(runs)):
        assert size_of(picture.png)[0] == PIXELS


def test_many_traces_go_on_several_pictures() -> None:
    runs = [run_of("lru", 0.5, trace=f"t{number}") for number in range(pictures.PANELS + 1)]
    names = [picture.name for picture in draw_all(study_of(runs)) if picture.kind == "traces"]
    assert names == ["traces-1", "traces-2"]


def test_without_matplotlib_the_error_says_what_to_install(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name: str, *args: Any, **extra: Any) -> Any:
        if name.split(".", maxsplit=1)[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **extra)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'kvstrata\[sim\]'"):
        draw_all(study)
