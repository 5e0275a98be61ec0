"""The page in a real browser, by keyboard, and the command as a process: judging, undo, a kill, going on, the end."""

import itertools
import json
import re
import signal

import pytest
from support.browser import CHROMIUM, CONTRAST, Browser
from support.labeling import EVIL, write_candidates
from support.runs import command

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="needs chromium")]


@pytest.fixture
def start(tmp_path):
    """A function that starts the command: (the process, the address of its page, what it said before)."""
    started = []

    def begin():
        given = f"--candidates={tmp_path / 'given.jsonl'}", f"--out={tmp_path / 'labels'}"
        process = command("ftjax.label", *given, "--labeler=anna", "--question=Better?", talks=True)
        started.append(process)
        said = ""
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", said)):
            line = process.stdout.readline()
            assert line, process.communicate()
            said += line
        return process, found[0], said

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def labels(root):
    return [json.loads(line) for line in (root / "labels/labels.jsonl").read_text().splitlines()]


def press(browser, *keys):
    for key in keys:
        browser.press(key)
        browser.wait(f"!busy && ({json.dumps(key != 'Escape')} || !help.open)")


def open_page(browser, address):
    browser.open(address)
    browser.wait("document.activeElement.id === 'labeler'")
    assert browser.value("document.querySelectorAll('[hidden]').length") == 3
    assert browser.value("[...document.querySelectorAll('[hidden]')].every((one) => one.offsetParent === null)")


def begin(browser):
    browser.press("Enter")  # the name is there, and the field has the focus
    browser.wait("!document.getElementById('work').hidden")


def shown(browser, name):
    return browser.value(f"document.getElementById('{name}').textContent")


@pytest.fixture
def browser():
    with Browser() as browser:
        yield browser


def test_labeling_by_keyboard_with_a_kill_between(browser, start, tmp_path):
    write_candidates(tmp_path / "given.jsonl", prompts=9)
    process, address, said = start()
    assert "9 pairs of answers to 9 prompts are now in" in said
    open_page(browser, address)
    begin(browser)
    assert shown(browser, "progress") == "0 of 9 judged by anna"

    press(browser, "1", "2", "ArrowLeft", "ArrowRight", "T", "s")
    choices = [
        line["choice"] if line["choice"] in ("tie", "skip") else line["choice"] == line["left"]
        for line in labels(tmp_path)
    ]
    assert choices == [True, False, True, False, "tie", "skip"]
    assert shown(browser, "progress").startswith("6 of 9 judged by anna · ")
    press(browser, "u", "u")
    assert shown(browser, "progress").startswith("4 of 9 judged by anna")
    assert [line["pair"] for line in labels(tmp_path)[-2:]] == [line["pair"] for line in labels(tmp_path)[5:3:-1]]
    press(browser, "?", "1", "Escape")  # keys are not for the page while the help is open
    press(browser, "s")
    assert [line["choice"] for line in labels(tmp_path)[6:]] == ["undo", "undo", "skip"]
    browser.value("document.querySelector('[data-act=tie]').focus()")
    press(browser, "Enter")
    assert labels(tmp_path)[-1]["choice"] == "tie"
    assert browser.problems == []

    process.kill()
    process.communicate()
    before = labels(tmp_path)
    browser.press("1")
    browser.wait("trouble.textContent")
    assert shown(browser, "trouble").startswith("Not saved: the server does not answer.")
    with (tmp_path / "labels/labels.jsonl").open("a") as file:
        file.write('{"pair": "')

    process, address, said = start()
    assert "its last line was unfinished and is dropped" in said
    assert labels(tmp_path) == before
    browser.problems.clear()
    open_page(browser, address)
    begin(browser)
    assert shown(browser, "progress").startswith("6 of 9")
    press(browser, "u", "1", "2", "t")
    browser.value("document.querySelector('[data-act=finish]').click()")
    browser.wait("!document.getElementById('end').hidden")
    assert "preferences.jsonl: data.train reads it." in shown(browser, "summary")
    browser.value("document.getElementById('go-on').click()")
    browser.wait("!document.getElementById('work').hidden")
    press(browser, "1")
    assert shown(browser, "progress").startswith("9 of 9")
    assert browser.value("document.activeElement.id") == "end-title"
    assert browser.problems == []
    assert {re.match(r"http://127\.0\.0\.1:\d+/", one) is not None for one in browser.requests} == {True}

    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    rows = [json.loads(line) for line in (tmp_path / "labels/preferences.jsonl").read_text().splitlines()]
    assert f"{len(rows)} preferences in " in out
    assert "9 pairs judged by anna (9)." in out


def test_the_page_fits_every_screen_and_hostile_text_stays_text(browser, start, tmp_path):
    write_candidates(tmp_path / "given.jsonl", prompts=1)
    text = (tmp_path / "given.jsonl").read_text()
    (tmp_path / "given.jsonl").write_text(text.replace("Where is order 0?", "x" * 300 + " words of a prompt" * 200))
    _, address, _ = start()
    open_page(browser, address)
    states = {"start": ["Enter"], "pair": ["?"], "help": ["Escape", "t"], "end": []}
    for name, keys in states.items():
        for width, dark in itertools.product((360, 1200), (False, True)):
            browser.view(width, dark)
            assert browser.value("document.documentElement.scrollWidth") <= width
            assert {tag: ratio for tag, ratio in browser.value(CONTRAST).items() if ratio < 4.5} == {}
            browser.screenshot(tmp_path / f"{name}-{width}-{'dark' if dark else 'light'}.png", whole=False)
        if name == "pair":
            answers = shown(browser, "left"), shown(browser, "right")
            assert EVIL.replace("\u202e", "[U+202E]").replace("\x1b", "[U+001B]") in answers
            assert browser.value("document.querySelectorAll('img, main script').length") == 0
            assert browser.value("document.title") == "Better?"
            reached = set()
            for _ in range(9):
                browser.press("Tab")
                reached.add(browser.value("document.activeElement.dataset.act ?? document.activeElement.id"))
            assert reached >= {"prompt", "left", "right", "tie", "skip", "help", "finish"}
            assert browser.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        for key in keys:
            press(browser, key)
    assert browser.problems == []
