"""The page in a real browser, from a file, without a network: no error, all pictures, tables that sort."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_kit import twelve_runs

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--window-size=1100,1400",
)  # fmt: skip
SHOTS = os.environ.get("KVSTRATA_SCREENSHOTS")
"""A folder for screenshots of the page, for people to look at."""

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium is not there: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from kvstrata.sim.report.page import write_report

    pytest.importorskip("matplotlib", reason="pip install 'kvstrata[sim]'")
    return write_report(twelve_runs(), tmp_path_factory.mktemp("report"), title="A & B")[0]


@pytest.fixture(scope="module")
def browser(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        driver.execute_cdp_cmd("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        driver.get(page.as_uri())
        yield driver
    finally:
        driver.quit()


def column(browser: Any, table: str, name: str) -> tuple[Any, list[str]]:
    """The button in a column's heading, and the column's raw values from the top."""
    parent = f"(//*[@id='{table}']/following::table)[1]"
    heading = browser.find_element("xpath", f"{parent}/thead/tr/th[normalize-space()='{name}']")
    place = browser.execute_script("return arguments[0].cellIndex + 1", heading)
    cells = browser.find_elements("xpath", f"{parent}/tbody/tr/td[{place}]")
    return heading.find_element("tag name", "button"), [cell.get_attribute("data-value") for cell in cells]


def test_the_console_has_no_error_and_nothing_was_fetched(browser: Any) -> None:
    assert browser.title == "A & B"
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []


def test_every_picture_is_there(browser: Any) -> None:
    widths = browser.execute_script("return [...document.images].map(i => [i.complete, i.naturalWidth])")
    assert len(widths) >= 7
    assert all(complete and width > 1000 for complete, width in widths)


def test_nothing_is_wider_than_the_page(browser: Any) -> None:
    for width in (1100, 400):
        browser.set_window_size(width, 1400)
        inner, outer = browser.execute_script(
            "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert inner <= outer
    browser.set_window_size(1100, 1400)


def test_a_click_on_a_heading_sorts_its_table(browser: Any) -> None:
    button, values = column(browser, "table-headline", "wasted ratio")
    before = [float(value) for value in values]
    button.click()
    down = [float(value) for value in column(browser, "table-headline", "wasted ratio")[1]]
    button.click()
    up = [float(value) for value in column(browser, "table-headline", "wasted ratio")[1]]
    assert before != down
    assert down == sorted(before, reverse=True) and up == sorted(before)
    assert button.find_element("xpath", "..").get_attribute("aria-sort") == "ascending"


def test_names_are_sorted_as_names_and_no_value_stays_last(browser: Any) -> None:
    button, _ = column(browser, "table-headline", "policy")
    button.click()
    names = column(browser, "table-headline", "policy")[1]
    assert names == sorted(names)
    for _ in range(2):
        button, values = column(browser, "table-headline", "gap to belady")
        assert values.count("") == 1
        button.click()
        assert column(browser, "table-headline", "gap to belady")[1][-1] == ""


def test_every_anchor_leads_somewhere(browser: Any) -> None:
    for link in browser.find_elements("css selector", "nav a"):
        target = link.get_attribute("href").split("#")[1]
        assert browser.find_element("id", target).is_displayed()


def test_dark_and_paper(browser: Any) -> None:
    colors = {}
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        colors[scheme] = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        if SHOTS:
            browser.save_screenshot(str(Path(SHOTS) / f"report-{scheme}.png"))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert colors["light"] != colors["dark"]
    paper = browser.print_page()
    assert len(paper) > 10_000
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
