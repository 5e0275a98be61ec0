"""Both phases with models that are functions: chains, comparisons, what is trained on, and a kill anywhere."""

import json
import re

import numpy as np
import pytest

from ftjax import constitution
from ftjax.constitutional import comparing, journal, requests, revising
from ftjax.constitutional.models import Asked, Text
from ftjax.constitutional.principles import Example, Principle
from ftjax.data.format.formats import check_row
from ftjax.errors import UserError
from ftjax.prompts import Prompt

KIND = Principle("kind", "Say where it is rude.", "Rewrite it.", "Which is kinder?")
SHORT = Principle("short", "Say what is long.", "Shorten it.", "Which is shorter?")
EXAMPLES = [Example("kind", "Hi", "Go away", "It sends away.", "Hello"), Example("short", "Hi", "H i", "Long.", "Hi!")]
PROMPTS = [Prompt(f"p:{i}", {"prompt": f"question {i}"}) for i in range(3)]


def writer(name="model", choose=None):
    """Writes what it is asked and how it is to draw."""

    def write(conversations, most, sampling, first):
        return [Text(f" {name} {sampling.seed % 97} {first + i} ", True) for i in range(len(conversations))]

    return Asked(name, write, choose)


def test_a_chain_holds_each_round_and_examples_come_before_the_request():
    seen = []

    def write(conversations, most, sampling, first):
        seen.append(conversations)
        return [Text(f"said {len(seen)}.{i}", i < 2) for i in range(len(conversations))]

    how = revising.Revising([KIND, SHORT], EXAMPLES, rounds=2, shots=1)
    chains = revising.revise(PROMPTS, 5, writer(), Asked("critic", write, None), how)
    assert len(seen) == 4
    assert [chain["critiques"] for chain in chains] == [[f"said 1.{i}", f"said 3.{i}"] for i in range(3)]
    assert [chain["revisions"] for chain in chains] == [[f"said 2.{i}", f"said 4.{i}"] for i in range(3)]
    assert all(sorted(chain["principles"]) == ["kind", "short"] for chain in chains)  # another one each round
    by_name = {"kind": (KIND, EXAMPLES[0]), "short": (SHORT, EXAMPLES[1])}
    for i, chain in enumerate(chains):
        for round_, asked in enumerate(seen[1::2]):
            principle, example = by_name[chain["principles"][round_]]
            assert [turn["role"] for turn in asked[i]] == ["user", "assistant", "user"]
            texts = [turn["content"] for turn in asked[i]]
            assert texts[1] == example.revision
            assert texts[0].endswith(f"Critique: {example.critique}\n\n{principle.revise}")
            latest = chain["answer"] if round_ == 0 else chain["revisions"][0]
            start = f"A request, and an answer to it.\n\nRequest: question {i}\n\nAnswer: {latest}\n\n"
            assert texts[2] == f"{start}Critique: {chain['critiques'][round_]}\n\n{principle.revise}"
            critique = [turn["content"] for turn in seen[2 * round_][i]]
            assert critique[1:] == [example.critique, start + principle.critique]
    rows = revising.trained(chains)  # the third one is cut
    assert rows == [{"prompt": f"question {i}", "completion": f"said 4.{i}"} for i in range(2)]
    assert check_row(rows[0], "r:1").fields == rows[0]


def by_contents(conversations):
    """Depends on everything that is asked, as a model would."""
    return np.array([(sum(i * ord(c) for i, c in enumerate(str(one))) % 89 + 5) / 100 for one in conversations])


@pytest.mark.parametrize("think", [False, True])
def test_a_probability_is_the_mean_over_principles_and_both_orders_clamped_after_thoughts(think):
    asked = []

    def choose(conversations):
        asked.extend(conversations)
        return by_contents(conversations)

    how = comparing.Comparing([KIND, SHORT], EXAMPLES, principles=2, shots=2, think=think)
    rows = comparing.compare(PROMPTS, 0, writer(), writer("thought", choose), how)
    assert len(asked) == 3 * 2 * 2
    said = by_contents(asked)
    said = np.clip(said, 0.4, 0.6) if think else said
    for row, values in zip(rows, said.reshape(3, 2, 2), strict=True):
        expected = np.mean([[in_order, 1 - reversed_] for in_order, reversed_ in values])
        np.testing.assert_allclose(row["probability"], expected, rtol=1e-15)
        assert {one["principle"] for one in row["feedback"]} == {"kind", "short"}
        assert all(("thoughts" in one) == think for one in row["feedback"])
    first, second = rows[0]["answers"]
    texts = [turn["content"] for turn in asked[0]]
    question = texts[-3] if think else texts[-1]
    assert f"(A) {first}\n\n(B) {second}" in question
    other = [turn["content"] for turn in asked[1]][-3 if think else -1]
    assert f"(A) {second}\n\n(B) {first}" in other
    # The better answer of the examples stands at both places.
    assert [text for text in texts if re.fullmatch(r"\([AB]\)", text)] == ["(B)", "(A)"]
    assert texts[-1].endswith(requests._CHOOSE)


def test_preferences_are_the_likelier_answers_with_their_probability():
    def row(first, second, probability, prompt="q"):
        return {"prompt": prompt, "answers": [first, second], "probability": probability}

    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]
    rows = [row("x", "y", 0.75), row("x", "y", 0.25), row("x", "x", 0.5), row("", "y", 0.1), row("x", "y", 0.55)]
    rows.append(row("x", "y", 0.9, turns))
    found = comparing.preferences(rows, 0.6)
    assert [(pair["chosen"], pair["rejected"], pair["probability"]) for pair in found[:2]] == [
        ("x", "y", 0.75),
        ("y", "x", 0.75),
    ]
    assert len(found) == 3
    assert len(comparing.preferences(rows, 0.5)) == 4
    for pair in found:
        assert check_row(pair, "r:1").fields["probability"] == pair["probability"]


class Killed(BaseException):
    pass


def arguments(tmp_path, out, command="revise", **changes):
    (tmp_path / "p.txt").write_text("".join(f"question {i}\n" for i in range(7)))
    words = ["--prompts", str(tmp_path / "p.txt"), "--model", "m", "--out", str(tmp_path / out), "--batch_size", "2"]
    return constitution.parse([command, *words, *(word for name, to in changes.items() for word in (f"--{name}", to))])


@pytest.mark.parametrize(("command", "file"), [("revise", "chains.jsonl"), ("compare", "comparisons.jsonl")])
def test_a_command_that_is_killed_ends_with_the_files_of_one_that_is_not(tmp_path, capsys, command, file):
    run = getattr(constitution, command)
    plain = writer("model", by_contents)
    run(arguments(tmp_path, "whole", command), lambda: (plain, plain))
    calls = 0

    def write(conversations, most, sampling, first):
        nonlocal calls
        calls += 1
        if calls in (2, 4):
            raise Killed
        return plain.write(conversations, most, sampling, first)

    dying, kills = Asked("model", write, by_contents), 0
    while True:
        try:
            run(arguments(tmp_path, "resumed", command), lambda: (dying, dying))
            break
        except Killed:
            kills += 1
            with (tmp_path / "resumed" / file).open("ab") as journal_:  # what a kill in the middle of a block leaves
                journal_.write(b'{"prompt": "question 0"}\n{"prompt": "que')
    assert kills == 2
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir() if path.name[0] != "."}
    assert len(files) == 3
    assert {path.name: path.read_bytes() for path in (tmp_path / "resumed").iterdir() if path.name[0] != "."} == files
    assert len(files[file].splitlines()) == 7
    capsys.readouterr()

    def never():
        raise AssertionError("a model is loaded for what is there")

    run(arguments(tmp_path, "whole", command), never)  # a finished one loads nothing
    assert "7 of 7 prompts are done already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"holds rows of other settings: seed was 0 and is now 1\. Name another --out"):
        run(arguments(tmp_path, "whole", command, seed="1"), never)
    (tmp_path / "c.yaml").write_text("- {name: n, critique: c, revise: r, prefer: p}\n")
    changed = {"constitution": str(tmp_path / "c.yaml"), "shots": "0"}
    changed |= {"principles": "1"} if command == "compare" else {}
    with pytest.raises(UserError, match="holds rows of other settings"):
        run(arguments(tmp_path, "whole", command, **changed), never)


def test_a_directory_of_another_process_or_with_other_files_or_damaged_rows_is_refused(tmp_path):
    out = tmp_path / "out"
    with (
        journal.opened(out, "rows.jsonl", {"a": 1}, 2, 3) as rows,
        pytest.raises(UserError, match=r"another ftjax\.constitution is at work"),
        journal.opened(out, "rows.jsonl", {"a": 1}, 2, 3),
    ):
        pass
    rows.add([{"x": 1}, {"x": 2}])
    (out / "rows.jsonl").write_text('{"x": 1}\nno\n')
    with pytest.raises(UserError, match=r"rows.jsonl:2: is no row"), journal.opened(out, "rows.jsonl", {"a": 1}, 2, 3):
        pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with (
        pytest.raises(UserError, match="holds other files; name a new directory"),
        journal.opened(tmp_path / "other", "rows.jsonl", {}, 2, 3),
    ):
        pass


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --model"),
        (["--model", "m", "--workdir", "w"], "give either --model"),
        (["--workdir", "w", "--adapter", "a"], "--adapter goes with --model"),
        (["--model", "m", "--step", "3"], "--step goes with --workdir"),
        (["--model", "m", "--critic_url", "http://h/v1"], "--critic_url needs --critic NAME"),
        (["--model", "m", "--critic_key", "K"], "--critic_key goes with --critic_url"),
        (["--workdir", "w", "--critic_adapter", "none"], "beside --workdir needs --critic"),
        (["--workdir", "w", "--dtype", "bfloat16"], "--dtype goes with --model or a --critic here"),
        (["--model", "m", "--temperature", "0"], "--temperature must be above 0"),
        (["--model", "m", "--principles", "13"], "the constitution has 12"),
        (["--model", "m", "--critic_temperature", "1"], "--critic_temperature goes with --think"),
        (["--model", "m", "--constitution", "CONSTITUTION"], "needs --examples FILE"),
        (["--model", "m", "--shots", "0", "--examples", "e.yaml"], "--shots 0 shows none"),
    ],
)
def test_what_does_nothing_together_is_refused_before_anything_is_written(tmp_path, words, message):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps([KIND._asdict()]))
    words = [str(path) if word == "CONSTITUTION" else word for word in words]
    args = constitution.parse(["compare", "--prompts", "p.txt", "--out", str(tmp_path / "out"), *words])
    with pytest.raises(UserError, match=message):
        constitution.main(args)
    assert not (tmp_path / "out").exists()


def test_the_constitution_is_shown(capsys):
    assert constitution.main(constitution.parse(["--show"])) == 0
    assert "- name: harmless" in capsys.readouterr().out
