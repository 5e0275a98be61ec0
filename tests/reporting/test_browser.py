"""The page in a real browser: on a phone, in the dark, by keyboard, without a request or a complaint."""

import itertools

import pytest
from support.browser import CHROMIUM, CONTRAST, Browser
from support.reports import write_all, write_workdir

from ftjax.reporting import page

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium")


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    workdirs = [write_all(root / "a"), write_workdir(root / "b", evil=True), write_workdir(root / ("long" * 40))]
    files = []
    for i, some in enumerate([workdirs[:1], workdirs[1:2], workdirs]):
        files.append(root / f"{i}.html")
        page.write(some, files[-1])
    return files


def test_nothing_runs_over_the_edge_in_any_light(browser, pages):
    for file in pages:
        browser.open(file)
        browser.value("document.querySelectorAll('details').forEach((one) => one.open = true)")
        grounds = set()
        for width, dark in itertools.product((360, 1200), (False, True)):
            browser.view(width, dark)
            assert browser.value("document.documentElement.scrollWidth") <= width
            grounds.add((dark, browser.value("getComputedStyle(document.body).backgroundColor")))
        assert grounds == {(False, "rgb(255, 255, 255)"), (True, "rgb(21, 24, 28)")}
    assert browser.problems == []
    assert {address.partition(":")[0] for address in browser.requests} == {"file"}
    assert len(browser.requests) == len(pages)


def test_text_stands_out_from_its_ground(browser, pages):
    """WCAG 2.2, 1.4.3: a contrast of 4.5 or more."""
    browser.open(pages[0])
    for dark in (False, True):
        browser.view(1200, dark)
        found = browser.value(CONTRAST)
        assert {"INS.", "DEL.", "MARK.", "A."} <= found.keys()
        assert {name: ratio for name, ratio in found.items() if ratio < 4.5} == {}


def test_everything_is_reached_by_keyboard_and_samples_are_filtered(browser, pages):
    browser.open(pages[1])
    wanted = browser.value("document.querySelectorAll('a, input, summary, .wide').length")
    folded = browser.value("document.querySelectorAll('details:not([open]) :is(input, .wide, summary)').length")
    own = browser.value("document.querySelectorAll('details:not([open]) > summary').length")
    reached = set()
    for i in range(wanted):
        browser.press("Tab")
        reached.add(browser.value(f"document.activeElement.dataset.seen ??= '{i}'"))
        if browser.value("document.activeElement === document.body"):
            break
    assert len(reached - {None}) >= wanted - folded + min(own, 1)
    browser.value("document.activeElement.blur(); document.querySelector('#samples summary').focus()")
    browser.press("Enter")
    assert browser.value("document.querySelector('#samples details').open")
    browser.value("filter.value = 'ORDER 15 '; filter.dispatchEvent(new Event('input'))")
    assert browser.value("matches.textContent") == "1 of 16 samples"
    assert browser.value("document.querySelectorAll('article:not([hidden])').length") == 1
    browser.value("filter.value = ''; filter.dispatchEvent(new Event('input'))")
    assert browser.value("document.querySelectorAll('article[hidden]').length") == 0
