"""The page in a real browser, by keyboard: a key, rows that are checked, a job with its curves, a chat, deleting."""

import itertools
import json
import re
import time

import pytest
from support.browser import CHROMIUM, CONTRAST, Browser
from support.hosted import hosted
from support.runs import write_model

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="needs chromium")]

EVIL = "<img src=x onerror=alert(1)>.jsonl"
FINAL = "['succeeded', 'failed', 'cancelled'].includes(shown?.job.status)"


def row(number):
    question = {"role": "user", "content": f"The lamp of room {number} is broken"}
    return {"messages": [question, {"role": "assistant", "content": f"send {number}"}]}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    model = write_model(root / "tiny")
    changes = {"model.source": str(model), "model.dtype": "float32", "model.param_dtype": "float32"}
    changes |= {"jobs.settings": ("adapter.rank=4",), "generation.max_length": 256}
    with hosted(root / "server", **changes) as server:
        yield server


@pytest.fixture
def browser(server):
    with Browser() as browser:
        browser.view(1200)
        browser.open(f"{server.url}/")
        yield browser


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def enter(browser, key):
    browser.wait("document.activeElement.id === 'key'")
    browser.send("Input.insertText", text=key)
    browser.press("Enter")
    browser.wait("!element('jobs').hidden || element('trouble').textContent")


def go(browser, view):
    browser.value(f"location.hash = {json.dumps(view)}")
    name = view.partition("=")[0]
    browser.wait(f"!element({json.dumps(name)}).hidden && document.activeElement.id === {json.dumps(name + '-title')}")


def choose(browser, field, path):
    root = browser.send("DOM.getDocument")["root"]["nodeId"]
    node = browser.send("DOM.querySelector", nodeId=root, selector=f"#{field}")["nodeId"]
    browser.send("DOM.setFileInputFiles", files=[str(path)], nodeId=node)


def long(browser, expression):
    """As `wait`, for minutes."""
    deadline = time.monotonic() + 600
    while not browser.value(expression):
        assert time.monotonic() < deadline, (expression, browser.value("document.body.innerText"))
        time.sleep(0.1)


def text(browser, id):
    return browser.value(f"element({json.dumps(id)}).textContent")


def tab_to(browser, condition):
    """By the Tab key alone, to an element that is `document.activeElement` of the condition; it shows its focus."""
    for _ in range(60):
        browser.press("Tab")
        if browser.value(f"(({condition})(document.activeElement))"):
            assert browser.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            return
    raise AssertionError(condition)


def fits(browser, name, folder):
    for width, dark in itertools.product((360, 1200), (False, True)):
        browser.view(width, dark)
        assert browser.value("document.documentElement.scrollWidth") <= width, (name, width)
        assert {tag: ratio for tag, ratio in browser.value(CONTRAST).items() if ratio < 4.5} == {}, (name, dark)
        browser.screenshot(folder / f"{name}-{width}-{'dark' if dark else 'light'}.png")
    browser.view(1200)


def test_from_a_file_to_a_model_that_answers(server, browser, tmp_path):
    fits(browser, "key", tmp_path)
    enter(browser, server.key("anna"))
    assert text(browser, "no-jobs").startswith("There are none yet.")
    assert browser.value("sessionStorage.getItem('key')") == server.key("anna")

    # A file with a bad row is not trained on; the page names the line.
    go(browser, "new")
    bad = [row(0), {"messages": [{"role": "user", "content": "?"}]}, *map(row, range(2, 9))]
    choose(browser, "file", write(tmp_path / EVIL, bad))
    long(browser, "element('findings').children.length")
    assert f"error: {EVIL}:2: no assistant turn" in text(browser, "findings")
    assert text(browser, "check-state").startswith("The job cannot start: 1 error")
    assert browser.value("element('start').disabled")
    assert browser.value("document.querySelectorAll('img').length") == 0
    fits(browser, "findings", tmp_path)

    # Another one is, by keyboard.
    choose(browser, "file", write(tmp_path / "rows.jsonl", map(row, range(16))))
    long(browser, "element('check-state').className === 'passed'")
    choose(browser, "heldout", write(tmp_path / "heldout.jsonl", map(row, range(16, 20))))
    long(browser, "form.heldout && element('check-state').className === 'passed'")
    browser.value("element('new-title').focus()")
    tab_to(browser, "(one) => one.id === 'n_epochs'")
    browser.send("Input.insertText", text="2")
    tab_to(browser, "(one) => one.id === 'suffix'")
    browser.send("Input.insertText", text="lamps")
    tab_to(browser, "(one) => one.id === 'start'")
    browser.press("Enter")
    browser.wait("!element('job').hidden && shown")

    # Its events and curves come without anyone asking, and looking ends with the job.
    long(browser, FINAL)
    assert browser.value("shown.job.status") == "succeeded", text(browser, "events")
    assert browser.value("shown.job.method.supervised.hyperparameters.n_epochs") == 2
    titles = browser.value("[...document.querySelectorAll('#curves title')].map((one) => one.textContent)")
    assert any(re.fullmatch(r"training, step 1: [\d.]+", one) for one in titles)
    assert any(one.startswith("validation, step ") for one in titles)
    cells = browser.value(
        "[...document.querySelectorAll('#curves figure:first-child td')].map((one) => one.textContent)"
    )
    assert len(cells) >= 3 * 2
    assert "The job has successfully completed" in text(browser, "events")
    time.sleep(5)
    asked = len(browser.requests)
    time.sleep(5)
    assert len(browser.requests) == asked
    fits(browser, "job", tmp_path)
    name = browser.value("shown.job.fine_tuned_model")

    # Base and result answer the same message.
    go(browser, f"chat={name}")
    browser.wait("element('model-1').value.startsWith('ft:')")
    assert browser.value("element('model-0').value") == "tiny"
    browser.value("element('most').value = 8; element('message').focus()")
    browser.send("Input.insertText", text="The lamp of room 3 is broken")
    browser.press("Enter")
    browser.wait("element('send').disabled")
    long(browser, "!element('send').disabled")
    for column in (0, 1):
        assert browser.value(f"chats[{column}].map((one) => one.role)") == ["user", "assistant"]
        assert "The lamp of room 3 is broken" in text(browser, f"log-{column}")
    fits(browser, "chat", tmp_path)

    # The adapter comes as a file, and goes with its model once that is confirmed.
    go(browser, "stored")
    long(browser, "element('files').children.length")
    fits(browser, "stored", tmp_path)
    folder = tmp_path / "downloads"
    browser.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    buttons = "[...document.querySelectorAll('#models button')]"
    browser.value(f"{buttons}.find((one) => one.textContent === 'Download adapter').click()")
    browser.wait("element('said').textContent.endsWith('is downloaded.')")
    named = f"`Delete ${{short({json.dumps(name)})}}`"
    delete = f"{buttons}.find((one) => one.ariaLabel === {named})"
    for keys in (["Escape"], ["Tab", "Enter"]):
        browser.wait(f"!{delete}.disabled")
        browser.value(f"{delete}.click()")
        browser.wait("element('confirm').open && document.activeElement.textContent === 'Keep'")
        assert name in text(browser, "confirm-text")
        assert name in text(browser, "models")
        for pressed in keys:
            browser.press(pressed)
        browser.wait("!element('confirm').open")
    long(browser, f"!({delete})")
    with server.client() as client:
        assert name not in {model.id for model in client.models.list()}
    assert browser.problems == []
    assert {one.startswith((f"{server.url}/", "data:,", f"blob:{server.url}/")) for one in browser.requests} == {True}
    assert list(folder.glob("*.zip"))


def test_a_wrong_key_is_told_and_a_forgotten_one_leaves_nothing(server, browser):
    enter(browser, "wrong")
    assert text(browser, "trouble") == "the API key is wrong or has been revoked"
    browser.problems.clear()  # the 401
    enter(browser, server.key("bert"))
    browser.wait("!element('jobs').hidden")
    browser.value("element('leave').click()")
    browser.wait("document.activeElement.id === 'key'")
    assert browser.value("sessionStorage.length") == 0
    assert browser.value("[...document.querySelectorAll('main > section')].every((one) => one.hidden)")
    assert browser.problems == []


def test_without_a_key_the_page_is_all_there_is(server):
    import httpx2

    assert httpx2.get(f"{server.url}/").status_code == 200
    for path in ("/v1/ftjax/files/file-1/check", "/v1/ftjax/models/tiny/adapter", "/page.js"):
        assert httpx2.get(server.url + path).status_code == 401
