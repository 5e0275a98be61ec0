"""Prompts of a file are answered as transformers answers each alone, in their order; mistakes have their places."""

import io
import json

import pytest
import torch
from support.runs import write_model
from transformers import AutoModelForCausalLM

from ftjax import generate, prompts
from ftjax.errors import UserError
from ftjax.sampling.sampler import Sampling
from ftjax.training.display import Display

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}, {"role": "user", "content": "why"}]
ROWS = [
    {"prompt": "The red lamp is broken", "completion": "send red"},
    {"messages": [*TURNS, {"role": "assistant", "content": "so"}]},
    {"instruction": "blue"},
    {"text": "Once upon a"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def loaded(model):
    base, variables = generate.load_model(str(model), {}, "float32")
    return base, variables[generate.NONE]


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(tmp_path / "rows.jsonl")


def complete(loaded, asked, **options):
    base, variables = loaded
    ids = prompts.encode(asked, base, 6, **options)
    with Display(1) as display:
        return prompts.complete(base, variables, ids, 6, Sampling(), 4, display)


def test_a_file_is_answered_in_its_order_as_transformers_does(model, loaded, rows, tmp_path, capsys):
    asked, tokenizer = prompts.of_file(rows), loaded[0].tokenizer
    answers = complete(loaded, asked)
    completions = [answer.text for answer in answers]
    theirs = AutoModelForCausalLM.from_pretrained(model)
    for prompt, answer in zip(asked, answers, strict=True):
        ids = torch.tensor(prompts.tokens(prompt, tokenizer)[None], dtype=torch.long)
        mask, ends = torch.ones_like(ids), list(loaded[0].end_tokens)
        made = theirs.generate(
            ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=ends, pad_token_id=0
        )
        assert answer.text == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer[1:] == (ids.shape[1], made.shape[1] - ids.shape[1], int(made[0, -1]) in ends)
    assert len(set(completions)) > 1
    assert "completing: 4 of 4" in capsys.readouterr().out
    prompts.write(tmp_path / "out.jsonl", asked, completions)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in written] == completions
    assert [row["prompt"] for row in written] == ["The red lamp is broken", TURNS, "blue", "Once upon a"]


def test_the_system_message_comes_before_prompts_that_have_none(loaded):
    tokenizer = loaded[0].tokenizer
    plain = prompts.Prompt("x", {"prompt": "hi"})
    own = prompts.Prompt("x", {"messages": [{"role": "system", "content": "Own."}, {"role": "user", "content": "hi"}]})
    said = [tokenizer.decode(prompts.tokens(prompt, tokenizer, system="Given.")) for prompt in (plain, own)]
    assert ["Given." in text for text in said] == [True, False]
    assert "Own." in said[1]
    with pytest.raises(UserError, match="leave out --system"):
        prompts.tokens(prompts.Prompt("x", {"text": "hi"}), tokenizer, system="Given.")


def test_raw_is_the_text_as_it_is(loaded):
    tokenizer = loaded[0].tokenizer
    assert prompts.tokens(prompts.Prompt("x", {"prompt": "hi"}), tokenizer, raw=True).tolist() == tokenizer.encode("hi")
    with pytest.raises(UserError, match=r"rows:3: is a conversation, which --raw"):
        prompts.tokens(prompts.Prompt("rows:3", {"messages": TURNS}), tokenizer, raw=True)


def test_a_text_file_holds_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffWhy?\nAnd then?\n", encoding="utf-8")
    assert prompts.of_file(str(path)) == [
        prompts.Prompt(f"{path}:1", {"prompt": "Why?"}),
        prompts.Prompt(f"{path}:2", {"prompt": "And then?"}),
    ]
    for text, message in {"Why?\n\nAnd?\n": r"prompts\.txt:2: prompt is empty", "": "is empty"}.items():
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            prompts.of_file(str(path))
    with pytest.raises(UserError, match="no such file"):
        prompts.of_file(str(tmp_path / "none.txt"))


def test_a_prompt_from_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\nAnd?\n"))
    assert prompts.given("-").fields == {"prompt": "Why?\nAnd?"}
    assert prompts.given("Why?").fields == {"prompt": "Why?"}
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    for text, origin in {"-": "standard input", " ": "--prompt"}.items():
        with pytest.raises(UserError, match=f"{origin} is empty"):
            prompts.given(text)


def test_what_cannot_be_done_is_told_before_it_is_begun(loaded, rows, tmp_path):
    long = prompts.Prompt("rows.jsonl:7", {"prompt": "lamp " * 600})
    with pytest.raises(UserError, match=r"rows\.jsonl:7: its \d+ tokens and --max_new_tokens=6 exceed"):
        complete(loaded, [long])
    with pytest.raises(UserError, match="exists"):
        prompts.check_out(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match="make it first"):
        prompts.check_out(tmp_path / "none/out.jsonl")
    prompts.check_out(tmp_path / "out.jsonl")


def test_a_conversation_keeps_its_system_message(loaded, monkeypatch):
    lines, seen = iter(["hi", "why", ""]), []
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    tokenizer = loaded[0].tokenizer
    generate._chat(loaded[0], [{"role": "system", "content": "Be brief."}], lambda ids: seen.append(ids) or "no", None)
    texts = [tokenizer.decode(ids) for ids in seen]
    assert [text.count("Be brief.") for text in texts] == [1, 1]
    assert "hi" in texts[1]
