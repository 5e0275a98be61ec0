"""Constitutions and examples: what ships is whole, and mistakes in a file name it, the principle and the fix."""

import pytest

from ftjax.constitutional import principles
from ftjax.constitutional.principles import SHIPPED_EXAMPLES, drawn, read, read_examples, shown
from ftjax.errors import UserError

ONE = '- {name: kind, critique: Say where., revise: Rewrite., prefer: "Which one?"}\n'
EXAMPLE = "- {principle: kind, prompt: Hi, answer: Never, critique: Rude., revision: Hello}\n"


def test_what_ships_is_a_dozen_principles_with_examples_of_some():
    constitution = read()
    assert len(constitution) == 12
    assert all(principle.prefer.endswith("?") for principle in constitution)
    assert len(read_examples(SHIPPED_EXAMPLES, constitution)) >= 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- name: kind\n  critique: Say where.\n", r"c.yaml: principle 1 \(kind\) has no `revise`; add it"),
        (ONE + ONE, r"two principles have the name 'kind'; give one of them another"),
        (ONE.replace("Rewrite.", "yes"), r"principle 1 \(kind\): revise is True; write text, in quotes"),
        (ONE.replace("prefer", "prefers"), r"\(kind\) has a field 'prefers'; did you mean 'prefer'"),
        ("- kind\n", r"c.yaml: principle 1 is 'kind'; write the fields name, critique, revise, prefer"),
        ("name: kind\n", r"c.yaml: must be a list with at least one principle"),
        ("- name: [\n", r"c.yaml:2: not YAML"),
    ],
)
def test_a_mistake_names_the_file_the_principle_and_the_fix(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "c.yaml")


def test_an_example_of_no_principle_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text(ONE)
    (tmp_path / "e.yaml").write_text(EXAMPLE + EXAMPLE.replace("kind", "kin"))
    with pytest.raises(UserError, match=r"e.yaml: example 2: the constitution has no principle 'kin'; did you mean"):
        read_examples(tmp_path / "e.yaml", read(tmp_path / "c.yaml"))
    with pytest.raises(UserError, match=r"gone\.yaml: no such file"):
        read(tmp_path / "gone.yaml")


def test_draws_follow_from_seed_and_names_and_examples_of_the_principle_come_last():
    constitution = read()
    first = drawn(constitution, 4, 0, "row 1")
    assert first == drawn(constitution, 4, 0, "row 1")
    assert len({principle.name for principle in first}) == 4
    assert first != drawn(constitution, 4, 1, "row 1") != drawn(constitution, 4, 1, "row 2")
    firsts = {drawn(constitution, 1, 0, f"row {i}")[0].name for i in range(200)}
    assert len(firsts) == 12
    honest = next(principle for principle in constitution if principle.name == "honest")
    examples = read_examples(principles.SHIPPED_EXAMPLES, constitution)
    found = shown(examples, honest, 2)
    assert (len(found), found[-1].principle) == (2, "honest")
    assert shown(examples, honest, 0) == []
    assert len(shown(examples, honest, 99)) == len(examples)
