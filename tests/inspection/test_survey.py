"""What inspection says of the rows is what training does with them, row by row and as a whole."""

import itertools
import json

import numpy as np
import pytest
from support.chat_templates import CHATML

from ftjax.data import pipeline
from ftjax.data.audit.checks import RowsOf, TokenFacts, at_start
from ftjax.data.audit.findings import STOPPING
from ftjax.data.read.sources import read_sources
from ftjax.errors import UserError
from ftjax.inspection.survey import epoch_of, survey
from ftjax.inspection.terminal import facts_of


def chat(question, answer, *more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}, *more]}


def pair(question, chosen, rejected):
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


LAMP = {"role": "user", "content": "and the lamp?"}
MUTED = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here.", "weight": 0}]
GOOD = [chat(f"Where is order {i}?", f"It is in town {i}.") for i in range(30)]
PAIRS = [pair(f"Where is order {i}?", f"In town {i}.", "No idea.") for i in range(30)]
# name -> the rows of one source, the kind that a run takes them as
SETS = {
    "good": (GOOD, "conversation"),
    "turns without an answer": (
        [*GOOD, chat("Is it blue?", "Yes.", LAMP), chat("Is it red?", "Yes.", LAMP)],
        "conversation",
    ),
    "not readable": ([*GOOD, chat("Why?", "")], "conversation"),
    "refused by the template": ([*GOOD, chat("no", "yes"), chat("no", "never")], "conversation"),
    "all refused": ([chat("no", "yes")] * 3, "conversation"),
    "dropped": ([*GOOD, chat("long " * 200, "yes")], "conversation"),
    "too many dropped": ([*GOOD[:8], chat("long " * 200, "yes")], "conversation"),
    "of weight 0": ([*GOOD, {"messages": MUTED}], "conversation"),
    "long texts": ([*GOOD, {"text": "order lamp " * 300}, chat("cut", "off " * 200)], "conversation"),
    "of another kind": ([*GOOD, PAIRS[0]], "conversation"),
    "pairs": (PAIRS, "pair"),
    "equal pairs": ([*PAIRS, pair("Why?", "So.", "So."), pair("no", "a", "b")], "pair"),
    "pairs that are equal but for white space": ([*PAIRS, pair("Why?", "It is so.", "It is  so.")], "pair"),
}


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer("{% if messages[0]['content'] == 'no' %}{{ raise_exception('not so') }}{% endif %}" + CHATML)


def trained(entries, tokenizer, spec):
    """What training does: (loader, report, findings), or the error with which it ends before the first step."""
    try:
        loader, report = pipeline.load(entries, tokenizer, spec)
        heldout = pipeline.load_heldout([], entries, tokenizer, spec)
    except UserError as error:
        return str(error)
    facts = TokenFacts.of(tokenizer, [tokenizer.eos_token_id], spec.max_length)
    return loader, report, at_start(loader.examples, [] if heldout is None else [RowsOf(heldout.examples)], facts)


@pytest.mark.parametrize("name", SETS)
def test_inspection_and_training_agree(name, tmp_path, tokenizer):
    rows, kind = SETS[name]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entries = [{"source": str(tmp_path / "a.jsonl")}]
    for bad, holdout, size in itertools.product((0, 1, 5), (0.0, 0.3), (1, 50)):
        spec = pipeline.DataSpec(kind, 96, size, True, "assistant", len(tokenizer), max_bad_rows=bad, holdout=holdout)
        held = pipeline.read_heldout([], entries, spec)
        found = survey(read_sources(entries, bad, holdout), held, tokenizer, [tokenizer.eos_token_id], spec)
        epoch = epoch_of(found, spec, 0, 1.0)
        case = f"{name}, max_bad_rows {bad}, holdout {holdout}, batch {size}: {[f.code for f in found.findings]}"
        stops = {finding.code for finding in found.findings if finding.severity == "error"} & STOPPING
        done = trained(entries, tokenizer, spec)
        if isinstance(done, str):
            assert stops or not epoch.steps, f"{case}; training: {done}"
            continue
        loader, report, findings = done
        assert not stops, case
        assert epoch.steps == loader.batches_in(1.0), case
        ours = (found.used, found.dropped, found.refused, found.tokens, found.trained, found.truncated, found.divided)
        names = ("examples", "dropped", "bad_rows", "tokens", "trained_tokens", "truncated", "divided")
        assert ours == tuple(report[name] for name in names), case
        told = {finding.code: (finding.severity, finding.count) for finding in findings}
        only_inspected = {"near_duplicate", "length", "skipped", "untrained", "eval_untrained"}
        assert {f.code: (f.severity, f.count) for f in found.findings if f.code not in only_inspected} == told, case


def test_a_pair_without_a_difference_is_skipped_by_both_where_bad_rows_are_allowed(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SETS["equal pairs"][0]))
    spec = pipeline.DataSpec("pair", 96, 1, True, "assistant", len(tokenizer), max_bad_rows=2)
    found = survey(read_sources([{"source": str(tmp_path / "a.jsonl")}], 2), [], tokenizer, [7], spec)
    assert {(finding.code, finding.severity) for finding in found.findings} >= {("skipped", "warning")}
    assert not [finding for finding in found.findings if finding.code in ("same_pair", "refused")]


def test_a_set_smaller_than_a_batch_has_steps_too(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOOD))
    spec = pipeline.DataSpec("conversation", 96, 50, True, "assistant", len(tokenizer))
    found = survey(read_sources([{"source": str(tmp_path / "a.jsonl")}]), [], tokenizer, [7], spec)
    epoch = epoch_of(found, spec, 24, 1.0)
    assert epoch.rows < spec.batch_size
    assert facts_of(found, epoch, spec, (50.0, "so"))["steps"].startswith("24 of 50 rows")
    assert np.isfinite(epoch.epochs)


@pytest.mark.parametrize("holdout", [0.0, 0.1])
def test_rows_that_cannot_be_read_are_not_blamed_on_the_hold_out(tmp_path, tokenizer, holdout):
    rows = "".join(f"Frage {i}?,Grüße\n" for i in range(5))
    (tmp_path / "a.csv").write_bytes(f"prompt,completion\n{rows}".encode("cp1252"))
    entries = [{"source": str(tmp_path / "a.csv")}]
    spec = pipeline.DataSpec("conversation", 96, 1, True, "assistant", len(tokenizer), holdout=holdout)
    held = pipeline.read_heldout([], entries, spec)
    found = survey(read_sources(entries, 0, holdout), held, tokenizer, [7], spec)
    (error,) = [str(finding) for finding in found.findings if finding.severity == "error"]
    assert "5 rows: not UTF-8" in error
