"""The page holds the rows whole and harmless, loads nothing, and is one well-formed document."""

import json
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from support.chat_templates import CHATML

from ftjax.data.audit.findings import Findings
from ftjax.data.format.example import Row
from ftjax.data.pipeline import DataSpec
from ftjax.data.tokens import chat
from ftjax.inspection import page
from ftjax.inspection.pieces import pieces
from ftjax.inspection.survey import Epoch, SourceCount, Survey

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & {{ROWS}} \u2028 <!-- 日本 🙂"
SPEC = DataSpec("conversation", 64, 4, True, "assistant", 400)


class Reader(HTMLParser):
    """Elements with their attributes, the text of scripts, and whether all that is opened is closed."""

    EMPTY = ("meta", "input")

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data


def rows_of(tokenizer, texts):
    rows = []
    for i, text in enumerate(texts):
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"yes {text}"}]
        example = chat.tokenize(Row({"messages": messages}, f"{text[:20]}.jsonl:{i}"), tokenizer)
        shown = pieces(example.tokens, example.trained, tokenizer)
        rows.append(page.PageRow(example.origin, 0, ["garbled"] if i % 2 else [], [("", shown)]))
    return rows


def survey(name="rows.jsonl"):
    findings = Findings()
    findings.add("leak", EVIL, what=f"as {EVIL}")
    lengths = np.array([3, 5, 60, 90, 12], np.int32)
    source = SourceCount(name, 1.0, 5, 5, 5, 5, 100, 40)
    return Survey([source], lengths=lengths, cut=lengths, findings=findings.all())


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer(CHATML)


def test_a_row_that_closes_scripts_is_harmless_and_comes_back_whole(tokenizer):
    rows = rows_of(tokenizer, ["plain", EVIL])
    text = page.render(survey(EVIL), Epoch(100, 3, 0.9, 1.0, 1, 1.0), SPEC, rows)
    read = Reader(text)
    assert read.open == []
    assert [tag for tag, _ in read.elements if tag in ("img", "iframe", "link", "object")] == []
    assert len(read.scripts) == 2
    assert "alert" not in read.scripts[1]
    embedded = json.loads(read.scripts[0])
    assert embedded["sources"] == [EVIL]
    whole = ["".join(row["examples"][0]["text"]) for row in embedded["rows"]]
    assert EVIL in whole[1]
    assert embedded["rows"][1]["codes"] == ["garbled"]
    assert not set("<>&\u2028\u2029") & set(read.scripts[0])


def test_the_page_asks_the_network_for_nothing(tokenizer):
    text = page.render(survey(), Epoch(100, 3, 0.9, 1.0, 1, 1.0), SPEC, rows_of(tokenizer, ["plain"]))
    read = Reader(text)
    attributes = {(tag, name) for tag, found in read.elements for name in found}
    assert not {name for _, name in attributes} & {"src", "href", "action", "background", "srcset"}
    assert "://" not in text
    assert "url(" not in text
    policy = next(found["content"] for tag, found in read.elements if found.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "innerHTML" not in text
    assert "prefers-color-scheme: dark" in text


def test_the_verdict_is_a_sentence(tokenizer):
    rows, good = rows_of(tokenizer, ["plain"]), survey()
    bad, good.findings = good.findings, []
    text = page.render(good, Epoch(100, 3, 0.9, 20.0, 1, 1.0), SPEC, rows)
    assert "<h2>Verdict</h2>\n<p>No errors and no warnings: training can start.</p>\n<ul></ul>" in text
    good.findings = bad
    for checks, what in (("on", "stop before its first step"), ("warn", "start all the same, as config.data.")):
        text = page.render(good, Epoch(1, 1, 1, 1.0, 1, 1.0), SPEC, rows, checks)
        assert f"<p>1 error and 0 warnings: training would {what}" in text


def test_nothing_runs_over_the_edge_of_a_phone(tokenizer):
    """Long names break anywhere and tables become blocks; that it is so at 320 and 360 pixels was seen in a browser."""
    style = page.render(survey(), Epoch(1, 1, 1, 1.0, 1, 1.0), SPEC, []).split("<style>")[1].split("</style>")[0]
    assert "h2, li, td, p { overflow-wrap: anywhere; }" in style
    phone = style.split("@media (max-width: 40rem) {\n")[1]
    assert "#facts, #facts tbody, #facts tr, #facts th, #facts td { display: block;" in phone
    assert "#sources tr { display: grid; grid-template-columns: repeat(4, 1fr);" in phone
    assert "max-width: 100%" in style.split("input, select, button {")[1].split("}")[0]


def test_every_token_is_there_with_whether_it_is_trained(tokenizer):
    rows = rows_of(tokenizer, ["Where is my order?", "日本 🙂"])
    embedded = json.loads(Reader(page.render(survey(), Epoch(1, 1, 1, 1.0, 1, 1.0), SPEC, rows)).scripts[0])
    for row, given in zip(embedded["rows"], rows):
        (one,) = row["examples"]
        trained = "".join(text for text, flags in zip(one["text"], one["flags"]) if "t" in flags)
        assert trained.startswith("yes ")
        assert trained.endswith("<|im_end|>")
        assert one["flags"][one["text"].index("<|im_end|>")] == "e"
        assert one["tokens"] == sum(piece.tokens for piece in given.examples[0][1])
        assert one["trained"] < one["tokens"]


def test_the_number_of_rows_and_tokens_on_the_page_is_bounded_and_said(tokenizer, monkeypatch):
    monkeypatch.setattr(page, "MAX_ROWS", 7)
    monkeypatch.setattr(page, "MAX_PIECES", 11)
    rows = rows_of(tokenizer, [f"row number {i}" for i in range(40)])
    text = page.render(survey(), Epoch(1, 1, 1, 1.0, 1, 1.0), SPEC, rows)
    embedded = json.loads(Reader(text).scripts[0])
    assert len(embedded["rows"]) == 7
    assert all(len(row["examples"][0]["text"]) == 11 for row in embedded["rows"])
    assert "This page holds 7 of 5 rows" in text
    assert page.render(survey(), Epoch(1, 1, 1, 1.0, 1, 1.0), SPEC, rows) == text


def test_the_histogram_counts_every_length_once():
    rects = [found for tag, found in Reader(page.svg(survey(), 64)).elements if tag == "rect"]
    assert sum(float(rect["height"]) > 0 for rect in rects) == 4
    assert any(tag == "line" for tag, _ in Reader(page.svg(survey(), 64)).elements)


# Enough of a browser for the page's code: elements that hold children, text, values and listeners.
BROWSER = """
const scripts = JSON.parse(require("fs").readFileSync(0, "utf8"));
class Element {
  constructor() { this.children = []; this.dataset = {}; this.listeners = {}; this.value = this.className = ""; }
  append(...all) { this.children.push(...all); }
  replaceChildren(...all) { this.children = all; }
  addEventListener(name, listener) { this.listeners[name] = listener; }
}
const ids = { data: new Element() };
ids.data.textContent = scripts[0];
globalThis.document = { getElementById: (id) => ids[id] ??= new Element(), createElement: () => new Element() };
new Function(scripts[1])();
const said = (row) => row.children.map((one) => one.textContent ?? one.children.map((c) => c.textContent).join(""));
const seen = () => [ids.count.textContent, ...ids.rows.children.map(said)];
const out = [seen()];
ids.code.value = "garbled"; ids.code.listeners.change(); out.push(seen());
ids.search.value = "ROW 3"; ids.search.listeners.input(); out.push(seen());
ids.search.value = ids.code.value = ""; ids.search.listeners.input(); ids.on.listeners.click(); out.push(seen());
ids.on.listeners.click(); ids.back.listeners.click(); ids.back.listeners.click(); out.push(seen());
console.log(JSON.stringify(out));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="needs node to run the page's code")
def test_the_pages_code_searches_filters_and_turns_pages(tokenizer):
    rows = rows_of(tokenizer, [f"row {i} {EVIL if i == 3 else ''}" for i in range(30)])
    scripts = Reader(page.render(survey(), Epoch(1, 1, 1, 1.0, 1, 1.0), SPEC, rows)).scripts
    done = subprocess.run(
        ["node", "-e", BROWSER], input=json.dumps(scripts), capture_output=True, text=True, timeout=60, check=True
    )
    everything, garbled, searched, second, first = json.loads(done.stdout)
    assert (everything[0], len(everything)) == ("30 rows, page 1 of 2", 26)
    assert garbled[0] == "15 rows, page 1 of 1"
    assert searched[0] == "1 rows, page 1 of 1"
    assert EVIL in "".join(searched[1])
    assert (second[0], len(second)) == ("30 rows, page 2 of 2", 6)
    assert first == everything
