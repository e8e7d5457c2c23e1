"""The page is whole, safe and self-contained; the files beside it are what it shows."""

from __future__ import annotations

import csv
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_kit import run_of, sample_runs, twelve_runs

from kvstrata.errors import ConfigError
from kvstrata.sim.report.page import PAGE, TEXT, render_page, sections_of, sheets_of, write_report
from kvstrata.sim.report.sheets import to_csv
from kvstrata.sim.tables import study_of

pytest.importorskip("matplotlib", reason="pip install 'kvstrata[sim]'")
pytest.importorskip("jinja2", reason="pip install 'kvstrata[sim]'")

VOID = {"meta", "link", "img", "br", "hr", "input"}
EVIL = """<script>alert("x")</script>' onload="x" & \u65e5"""


class Page(HTMLParser):
    """Every tag is closed by its own; collects what a browser would fetch, anchors and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.anchors: list[str] = []
        self.images = self.scripts = 0
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.images += tag == "img"
        self.scripts += tag == "script"
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "srcset", "href", "action", "data", "poster"):
                if tag == "a":
                    self.anchors.append(value or "")
                else:
                    self.fetched.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(twelve_runs(), folder)
    return folder


def test_a_report_of_real_runs(tmp_path: Path) -> None:
    files = write_report(sample_runs(), tmp_path / "new" / "report", title="Three hundred requests")
    names = {file.name for file in files}
    assert files[0].name == PAGE
    assert {PAGE, TEXT, "headline.csv", "hit-ratio.png", "regimes.png", "runs.csv"} <= names
    assert names == {file.name for file in (tmp_path / "new" / "report").iterdir()}
    page = Page(files[0].read_text())
    assert "Three hundred requests" in page.words
    for word in ("conversation-300", "lru_forward", "belady, which knows the future", "amplification"):
        assert word in page.words
    with open(tmp_path / "new" / "report" / "runs.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 12


def test_the_page_is_well_formed_and_fetches_nothing(made: Path) -> None:
    text = (made / PAGE).read_text()
    page = Page(text)
    assert page.images == sum(file.suffix == ".png" for file in made.iterdir())
    assert page.scripts == 1
    assert all(target.startswith("data:") for target in page.fetched), page.fetched
    assert len(page.ids) == len(set(page.ids))
    assert all(anchor.removeprefix("#") in page.ids for anchor in page.anchors)
    assert "http:" not in text and "https:" not in text
    assert "@import" not in text and "url(" not in text


def test_every_section_is_there(made: Path) -> None:
    titles = (
        "What was run", "The policies compared", "Hit ratio across capacities", "Two regimes",
        "Wasted admits", "Tuning", "Trace by trace", "What every word means", "What did not run, and why",
    )  # fmt: skip
    words, markdown = Page((made / PAGE).read_text()).words, (made / TEXT).read_text()
    for title in titles:
        assert title in words
        assert f"## {title}" in markdown
    for line in markdown.splitlines():
        if line.startswith("!["):
            assert (made / line.split("](")[1].rstrip(")")).exists()


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_from_outside_are_text(tmp_path: Path) -> None:
    runs = [run_of(policy, 0.5, trace=EVIL) for policy in ("lru", "<b>evil</b>")]
    text = write_report(runs, tmp_path, title=EVIL, notes=[f"{EVIL} did not run"])[0].read_text()
    page = Page(text)
    assert page.scripts == 1
    assert page.words.count(EVIL) >= 3
    assert "<b>evil</b>" in page.words
    assert "<b>" not in text and 'alert("' not in text
    assert "\\<script\\>" in (tmp_path / TEXT).read_text()


def test_what_did_not_run_is_said() -> None:
    fewer = [run for run in twelve_runs() if (run.policy, run.trace) != ("arc", "trace-1")]
    study = study_of(fewer)
    sections = sections_of(study, [], ["trace-9 could not be read: no such file"])
    words = Page(render_page(sections, "missing")).words
    assert "arc has no mean: 3 cells missing, trace-1 at 0.1%" in words
    assert "trace-9 could not be read: no such file" in words
    missing = next(sheet for sheet in sheets_of(study) if sheet.key == "missing")
    assert to_csv(missing).count("arc,trace-1") == 3


def test_nothing_is_replaced_without_force(tmp_path: Path) -> None:
    (tmp_path / "headline.csv").write_text("mine")
    with pytest.raises(ConfigError, match=r"headline\.csv exists.*--force"):
        write_report([run_of("lru")], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["headline.csv"]
    write_report([run_of("lru")], tmp_path, force=True)
    assert (tmp_path / "headline.csv").read_text() != "mine"


def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no runs"):
        write_report([], tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="not a folder"):
        write_report([run_of("lru")], tmp_path / "file")
