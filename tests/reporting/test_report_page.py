"""The page is one well-formed, harmless document that loads nothing and says all there is."""

import base64
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser

import pytest
from support.reports import EVIL, NAME, evaluation, start, write_all, write_workdir

from ftjax import report
from ftjax.errors import UserError
from ftjax.reporting import gather, page

EMPTY = ("meta", "input", "br")
SHOWN = EVIL.replace("\u202e", "[U+202E]").replace("\x1b", "[U+001B]").replace("\ud800", "[U+D800]")


class Document(HTMLParser):
    """Elements with their attributes in order, (tag, text) of those without children, and what stays open."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words, self.style, self.script = [], [], [], "", ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.elements.append((tag, dict(attributes)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):  # of SVG
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"line {self.getpos()}"
        if tag in ("td", "th"):
            self.words.append(" ")

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("style", "script"):
            setattr(self, self.open[-1], data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return " ".join("".join(self.words).split())


def check(text):
    """The document, once all that holds of every page holds."""
    text.encode()
    read = Document(text)
    assert text.startswith("<!doctype html>")
    assert read.open == []
    tags = {tag for tag, _ in read.elements}
    assert not tags & {"img", "iframe", "link", "object"}
    assert len(read.all("script")) == len(read.all("style")) == 1
    names = {(tag, name) for tag, attributes in read.elements for name in attributes}
    assert not {name for _, name in names} & {"src", "action", "background", "srcset", "style"}
    assert not [name for _, name in names if name.startswith("on")]
    assert not re.search(r"https?://|url\(|innerHTML", text)

    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"] for attributes in read.all("a")}
    assert targets
    assert targets <= {f"#{name}" for name in ids}
    assert {one["aria-labelledby"] for one in read.all("section")} <= set(ids)
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert levels.count(1) == 1

    assert len(read.all("table")) == len(read.all("caption")) > 3
    assert {one.get("scope") for one in read.all("th")} == {"row", "col"}
    regions = [one for one in read.all("div") if one.get("role") == "region"]
    assert all(one["tabindex"] == "0" and one["aria-label"] for one in regions)
    assert all(one.get("aria-label") or one.get("aria-hidden") for one in read.all("svg"))

    policy = next(one["content"] for one in read.all("meta") if "http-equiv" in one)
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(getattr(read, kind).encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    return read


def test_something_nasty_in_every_text_is_shown_and_harmless(tmp_path):
    read = check(page.render(gather.gather(write_all(tmp_path / "a"))))
    assert not read.all("b")
    # verdict, set, contestant, note, category, ability, prompt, answer, source, device, model, jax twice
    assert read.text.count(" ".join(SHOWN.split())) >= 13
    assert "49" in read.text
    assert "{{ 7 * 7 }}" in read.text
    assert not set("\u202e\x1b\ud800") & set(read.text)


def test_it_says_all_that_was_measured(tmp_path):
    workdir = write_all(tmp_path / "a")
    (workdir / "evaluation.json").write_text(json.dumps(evaluation()))
    starts = [start(0, 1000.0, 4600.0), start(20, 5000.0, 6000.0), start(40, 6000.0, 6800.0)]
    starts[2]["versions"] = {"jax": "0.10.3"}
    (workdir / "environment.json").write_text(json.dumps({"version": 1, "starts": starts}))
    text = check(page.render(gather.gather(workdir))).text
    for said in (
        "Verdict Tuning wins",
        f"{NAME} 0 % before training, 87.5 % at step 80: better",
        "90.5 % [86, 94]",
        "tuned against base, 8 examples: +41 points [33, 49], 92 % fewer prompt tokens",
        "A judge preferred tuned to base in 75 % [70, 80] of the examples.",
        "What each of them answered to 16 of the examples",
        "code en 812 2.31 2.35 +0.04",
        "all 2.9 2.93 +0.03 [0.01, 0.05]",
        "KL(base || tuned) on the held-out prompts: 0.8",
        "60 55 % 53 %",
        "device-hours 6, from start to end, over 3 starts",
        "training steps alone about 0.0444 hours, 0.178 device-hours",
        "tokens trained on 16,000",
        "model.source package:small",
        "examples 120",
        "From step 40 on jax 0.10.3",
    ):
        assert said in text
    assert "From step 20" not in text  # with the same versions as before
    assert "cost of 1,000" not in text  # which nobody has
    assert "python -m ftjax.evaluate" not in text


def test_without_an_evaluation_it_names_the_command(tmp_path):
    workdir = write_workdir(tmp_path / "a b", scores=(0.5, 0.25, 0.125))
    text = check(page.render(gather.gather(workdir))).text
    assert f"python -m ftjax.evaluate --workdir '{workdir}'" in text
    assert "The model before training scored better: " in text
    assert "Versions were not recorded" in text
    (workdir / "evaluation.json").write_text(json.dumps(evaluation(step=80)))
    assert (
        "The evaluation below is of step 80, and step 40 is what is used now."
        in check(page.render(gather.gather(workdir))).text
    )


def test_a_run_with_nothing_recorded_has_a_page(tmp_path):
    workdir = write_workdir(tmp_path / "a")
    for name in ("metrics.jsonl", "samples.jsonl"):
        (workdir / name).unlink()
    text = page.render(gather.gather(workdir))
    assert "No step has been recorded yet." in text
    assert Document(text).open == []


def test_what_differs_is_marked_on_both_sides(tmp_path):
    workdir = write_workdir(tmp_path / "a")
    (workdir / "evaluation.json").write_text(json.dumps(evaluation(text="")))
    text = page.render(gather.gather(workdir))
    assert '<pre dir="auto">send<ins> 6</ins> blue lamps<ins> </ins></pre>' in text
    marked = [("ins", " 6"), ("ins", " "), ("mark", " 5")]
    assert re.findall(r"<(ins|del|mark)>(.*?)</", text) == 16 * marked


def test_samples_for_the_worse_come_first_and_all_outcomes_have_room(tmp_path):
    (samples,) = gather.gather(write_workdir(tmp_path / "a")).samples
    found = page.groups([*samples.samples] * 40)
    assert [(group.title, group.count) for group in found] == [
        ("Changed for the worse", 40),
        ("Changed for the better", 14 * 40),
        ("Unchanged", 40),
    ]
    assert sum(len(group.samples) for group in found) == page.MAX_SAMPLES
    assert min(len(group.samples) for group in found) == page.MAX_SAMPLES // 3
    unscored = [one._replace(score_after=None, score_before=None) for one in samples.samples]
    assert [(one.title, len(one.samples)) for one in page.groups(unscored)] == [("Without a score", 16)]


def test_runs_are_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_workdir(tmp_path / "one/run", evil=True)
    measured = evaluation(text="")
    measured["sets"][0]["samples"] = []
    (tmp_path / "one/run/evaluation.json").write_text(json.dumps(measured))
    write_workdir(tmp_path / "two/run", scores=(0.0, 0.75, 0.5), evil=True, **{"adapter.rank": 4, "seed": 7})
    assert report.main(["one/run", "two/run"]) == 0
    assert capsys.readouterr().out == "report: comparison.html\n"
    read = check((tmp_path / "comparison.html").read_text())
    for said in (
        f"one/run is best by {NAME}: 87.5 %.",
        f"two/run: Training helped: {NAME} 0 % before, 75 % at step 40.",
        "Settings that differ key one/run two/run adapter.rank 16 4 seed 0 7",
        f"{NAME} 87.5 % from 0 % 75 % from 0 % and 50 % at the end",
        "support_ticket: score, tuned 90.5 % [86, 94]",
        "support_ticket: score, best prompt 49 % [42, 56], base, 8 examples",
        "cross-entropy of general text, change +0.03 nats per token [0.01, 0.05]",
        "training steps alone about 0.0444 hours on all devices together about 0.0444",
        "eval_general/loss 2.92 from 2.9",
        "16 prompts that all runs answered; where the runs differ most comes first",
        "1. one/run 1, two/run 0",
    ):
        assert said in read.text
    assert not read.all("img")
    shown, folded = read.text.split("Further curves: ")
    assert "eval_general/news" not in shown  # there may be dozens
    assert "eval_general/news" in folded


def test_the_command_writes_the_page_again_and_replaces_nothing_else(tmp_path, capsys):
    workdir = write_workdir(tmp_path / "a", steps=2)
    for _ in range(2):
        assert report.main([str(workdir)]) == 0
    assert capsys.readouterr().out == f"report: {workdir / 'report.html'}\n" * 2
    check((workdir / "report.html").read_text())
    with pytest.raises(UserError, match="is no report"):
        report.main([str(workdir), "--out", str(workdir / "metrics.jsonl")])
    with pytest.raises(UserError, match="given twice"):
        report.main([str(workdir), f"{workdir}/."])
    with pytest.raises(UserError, match="the workdir of a run"):
        report.main([str(tmp_path)])
