"""ftjax.evaluate on a tiny run: every contestant is given and measured as transformers and torch say; nothing twice."""

import html
import json

import numpy as np
import pytest
import torch
from support.adapted import assembled, moved
from support.runs import command, finish, write_model
from support.tiny import one_device
from transformers import AutoModelForCausalLM

from ftjax import assemble, evaluate, export, prompts, tree
from ftjax import config as configs
from ftjax.errors import UserError
from ftjax.evals import comparison, forgetting, shots
from ftjax.evals.judge import Judge
from ftjax.evaluate import Options
from ftjax.models.params import abstract_params
from ftjax.training.checkpoint import Checkpoints
from ftjax.weights.load import load_params

COLORS = ("blue", "red", "green", "brown", "white", "black")
OPTIONS = Options(shots=(2,), retrieved=(1,), instruction_budget=8, price_in=2.0, price_out=10.0)
NAMES = ["base", "base, 2 examples", "base, 1 retrieved example", "tuned"]


def row(i, first):
    asked = f"{'The' if first else 'A'} {COLORS[i % 6]} lamp {i}"
    return {
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": json.dumps({"color": COLORS[i % 6]})},
        ]
    }


def write(path, rows):
    path.write_text("".join(json.dumps(its) + "\n" for its in rows))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, the config with which it is evaluated): a checkpoint of adapters and a module, moved by noise."""
    root = tmp_path_factory.mktemp("run")
    config = configs.defaults()
    config.model.source = str(write_model(root / "model"))
    config.model.dtype = config.model.param_dtype = "float32"
    config.adapter.rank, config.adapter.modules_to_save = 2, ("norm",)
    config.data.train = (write(root / "train.jsonl", [row(i, True) for i in range(9)]),)
    config.data.batch_size, config.data.row_length, config.steps, config.accumulate = 2, 64, 1, 1
    config.data.max_length = 64
    config.evaluate.general = ()
    given = {"adapter.rank": 2, "adapter.modules_to_save": ("norm",)}
    with Checkpoints(root / "run/checkpoints") as checkpoints:
        checkpoints.save(1, {"trainable": moved(assembled(root / "model", **given)).trained}, {})
    configs.write(config, root / "run/config.json")
    held = [row(i, False) for i in range(12)]
    scored, plain = write(root / "scored.jsonl", held), write(root / "plain.jsonl", held)
    config.data.eval = ({"source": scored, "score": "exact"}, plain)
    texts = [{"text": f"Long ago {color} birds were in every garden.", "category": "tales"} for color in COLORS]
    config.evaluate.general = (write(root / "texts.jsonl", texts),)
    config.evaluate.max_new_tokens = 4
    return root / "run", config


@pytest.fixture(scope="module")
def document(run):
    workdir, config = run
    return evaluate.evaluate(workdir, OPTIONS, config)


def test_everybody_is_measured_on_every_set(run, document):
    workdir, _ = run
    assert json.loads((workdir / "evaluation.json").read_text()) == json.loads(json.dumps(document))
    scored, rows = document["sets"]
    assert (scored["name"], scored["metric"], scored["examples"]) == ("scored", "exact", 12)
    assert (rows["name"], rows["metric"], rows["examples"]) == ("held-out rows", "loss", 12)
    assert [its["name"] for its in scored["contestants"]] == NAMES
    assert [its["name"] for its in rows["contestants"]] == ["base", "tuned"]
    assert scored["form"] == "a JSON object with the key color"
    for its in scored["contestants"]:
        assert its["valid"] == np.mean([answer["valid"] for answer in its["answers"]])
        assert its["score"] == np.mean([answer["score"] for answer in its["answers"]])
        assert its["seconds"] > 0
        cost = 1000 * (its["prompt_tokens"] * 2e-6 + its["generated_tokens"] * 10e-6)
        assert its["cost"] == pytest.approx(cost)
    assert {its["against"] for its in scored["differences"]} == {*NAMES[:-1]}
    ratio = scored["contestants"][-1]["prompt_tokens"] / scored["contestants"][1]["prompt_tokens"]
    assert scored["differences"][1]["prompt_tokens"] == pytest.approx(ratio - 1)
    assert scored["samples"][0]["expected"] == json.dumps({"color": "blue"})
    assert set(scored["samples"][0]["completions"]) == set(NAMES)
    assert document["verdict"] == f"scored: {scored['verdict']} held-out rows: {rows['verdict']}"
    assert document["step"] == 1
    assert scored["verdict"] in html.unescape((workdir / "report.html").read_text())
    (tales,) = document["forgetting"]["categories"]
    assert (tales["name"], tales["texts"]) == ("tales", 6)
    assert document["forgetting"]["change"] == pytest.approx(tales["tuned"] - tales["base"])
    assert document["forgetting"]["change"] != 0
    assert document["forgetting"]["kl"] > 0
    assert document["forgetting"]["verdict"].startswith("general text: ")


def test_the_base_and_its_examples_are_what_transformers_answers(run, document):
    _, config = run
    theirs, base = AutoModelForCausalLM.from_pretrained(config.model.source), assemble.open_base(config.model)
    entry = {its["name"]: its for its in document["sets"][0]["contestants"]}
    shown = [its.example["messages"] for its in shots.training_questions(config, [])[:2]]
    assert all(its in [row(i, True)["messages"] for i in range(9)] for its in shown)
    for name, before in {"base": [], "base, 2 examples": [*shown[0], *shown[1]]}.items():
        for i in (0, 7):
            answer = entry[name]["answers"][i]
            expected = ours(theirs, base, [*before, *row(i, False)["messages"][:1]])
            assert (answer["completion"], answer["prompt_tokens"]) == expected


def ours(theirs, base, turns):
    """(completion, number of prompt tokens) of transformers for these turns, rendered by its own template."""
    text = base.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([base.tokenizer(text, add_special_tokens=False)["input_ids"]])
    mask, ends = torch.ones_like(ids), list(base.end_tokens)
    made = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=ends, pad_token_id=0
    )
    return base.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True), ids.shape[1]


def test_the_loss_of_the_base_is_that_of_torch(run, document):
    _, config = run
    theirs, base = AutoModelForCausalLM.from_pretrained(config.model.source), assemble.open_base(config.model)
    sums, tokens = [], []
    for i in range(12):
        turns = row(i, False)["messages"]
        whole, before = (
            base.tokenizer(base.tokenizer.apply_chat_template(its, tokenize=False, add_generation_prompt=prompt))
            for its, prompt in ((turns, False), (turns[:1], True))
        )
        ids = torch.tensor(whole["input_ids"])
        end = max(k for k, token in enumerate(whole["input_ids"]) if token == base.tokenizer.eos_token_id)
        with torch.no_grad():
            logps = theirs(ids[None]).logits[0].double().log_softmax(-1)
        places = range(len(before["input_ids"]), end + 1)
        sums.append(-sum(float(logps[k - 1, ids[k]]) for k in places))
        tokens.append(len(places))
    its = document["sets"][1]["contestants"][0]
    assert its["loss_tokens"] == tokens
    np.testing.assert_allclose(its["losses"], sums, rtol=1e-4)
    assert its["loss"] == pytest.approx(sum(sums) / sum(tokens), rel=1e-4)
    tuned, (difference,) = document["sets"][1]["contestants"][1], document["sets"][1]["differences"]
    assert difference["loss"] == pytest.approx(tuned["loss"] - its["loss"])
    assert difference["loss"] > difference["interval"][0] > 0  # noise is no training
    assert document["sets"][1]["verdict"].startswith("Do not tune: it raises the held-out loss by")


def test_the_same_command_measures_nothing_again(run, document, monkeypatch):
    workdir, config = run

    def never(*arguments):
        raise AssertionError("measured again")

    spoiled = json.loads((workdir / "evaluation.json").read_text())
    spoiled["sets"][0]["contestants"][0]["answers"][0]["score"] = 7  # as an older version of the score gave
    (workdir / "evaluation.json").write_text(json.dumps(spoiled))
    monkeypatch.setattr(prompts, "complete", never)
    monkeypatch.setattr(forgetting, "forgetting", never)
    again = evaluate.evaluate(workdir, OPTIONS._replace(price_in=4.0), config)
    first, second = ([its["answers"] for its in doc["sets"][0]["contestants"]] for doc in (document, again))
    assert first == second
    assert again["sets"][0]["contestants"][0]["cost"] > document["sets"][0]["contestants"][0]["cost"]
    fewer = evaluate.evaluate(workdir, OPTIONS._replace(only=("base",)), config)
    assert [its["name"] for its in fewer["sets"][0]["contestants"]] == NAMES  # what was measured stays
    assert fewer["forgetting"] == document["forgetting"]
    with pytest.raises(AssertionError, match="measured again"):
        evaluate.evaluate(workdir, OPTIONS._replace(only=("base",), limit=5), config)


def test_the_command_line_compares_the_same(run, document):
    workdir, config = run
    before = (workdir / "evaluation.json").read_text()
    configs.write(config, workdir.parent / "again.json")
    given = ("--shots=2", "--retrieved=1", "--instruction_budget=8", "--price_in=2", "--price_out=10")
    said = finish(command("ftjax.evaluate", f"--config={workdir.parent}/again.json", f"--workdir={workdir}", *given))
    table = [line for line in said.splitlines() if line.startswith(" ") and "[0, 0]" in line]
    assert [line.split("  ")[0].strip() for line in table] == NAMES
    assert document["verdict"] in said
    assert (workdir / "evaluation.json").read_text() == before
    assert "--workdir, the run that is evaluated" in finish(command("ftjax.evaluate"), 2)


def test_of_another_checkpoint_the_base_is_not_measured_again(run, document):
    workdir, _ = run
    record = comparison.Record(workdir / "evaluation.json", 2, "model")
    entry = record.document["sets"][0]
    record.drop_others({"base": entry["contestants"][0]["model"], "tuned": "another"})
    assert [its["name"] for its in entry["contestants"]] == NAMES[:-1]
    assert (record.document["step"], entry["verdict"], entry["differences"]) == (2, "", [])
    assert "forgetting" not in record.document


def test_adapters_and_whole_models_answer_too(run, document, tmp_path):
    """The run's own adapter answers as the run does, its base as a whole model as the base."""
    workdir, config = run
    export.export_peft(workdir, 1, tmp_path / "adapter")
    others = {"adapters": {"same": str(tmp_path / "adapter")}, "models": {"whole": config.model.source}}
    found = evaluate.evaluate(workdir, OPTIONS._replace(only=("same", "whole"), **others), config)
    scored, rows = ({its["name"]: its for its in entry["contestants"]} for entry in found["sets"])
    assert [*scored] == [*NAMES, "same", "whole"]
    assert scored["same"]["answers"] == scored["tuned"]["answers"]
    assert scored["whole"]["answers"] == scored["base"]["answers"]
    assert rows["same"]["loss"] == pytest.approx(rows["tuned"]["loss"], rel=1e-5)
    assert rows["whole"]["loss"] is None  # of other tokens, as far as can be known


def test_a_judge_says_whose_answers_win(run, document, capsys):
    workdir, config = run

    answers = {its["kind"]: [one["completion"] for one in its["answers"]] for its in document["sets"][1]["contestants"]}

    def verdicts(questions, origins):
        """The tuned model's for every other question, wherever it stands, and else ties."""
        count = len(questions) // 2
        if count == len(answers["tuned"]):
            assert questions[0].endswith(f"[{answers['tuned'][0]}|{answers['base'][0]}]")
            assert questions[count].endswith(f"[{answers['base'][0]}|{answers['tuned'][0]}]")
        return [letter if i % 2 else "TIE" for letter in "AB" for i in range(count)]

    options = OPTIONS._replace(only=("tuned",), judge=Judge("someone", verdicts, "{prompt}[{a}|{b}]"))
    found = evaluate.evaluate(workdir, options, config)["sets"][1]["win_rate"]
    assert (found["of"], found["against"], found["judge"], found["rate"]) == ("tuned", "base", "someone", 0.75)
    assert found["interval"][0] < 0.75
    assert (
        "rows: someone prefers the tuned model's answers to the base's at a win rate of 0.75 ["
        in capsys.readouterr().out
    )
    again = evaluate.evaluate(workdir, options._replace(judge=options.judge._replace(verdicts=None)), config)
    assert again["sets"][1]["win_rate"] == json.loads(json.dumps(found))  # nobody is asked twice


def test_what_cannot_be_compared_is_refused(run):
    workdir, config = run
    with pytest.raises(UserError, match="--only: there is no contestant 'tunde'; did you mean 'tuned'"):
        evaluate.evaluate(workdir, Options(only=("tunde",)), config)
    with pytest.raises(UserError, match=r"--config is not that of the run: adapter.rank: 2 -> 4"):
        evaluate.evaluate(workdir, Options(), configs.changed(config, {"adapter.rank": 4}))
    with pytest.raises(UserError, match=r"was decided in training, by the first score.*name another .* --step"):
        evaluate.evaluate(workdir, Options(), configs.changed(config, {"evaluate.best": "eval_loss"}))
    with pytest.raises(UserError, match=r"nothing to compare on: config.data.eval has no rows"):
        evaluate.evaluate(workdir, Options())
    with pytest.raises(UserError, match="--shots=1,many: 'many' is neither a number"):
        evaluate._numbers("shots", "1,many")
    assert evaluate._numbers("shots", "8,fit,1") == (1, 8, "fit")
    with pytest.raises(UserError, match="--model: the name 'tuned' is taken"):
        evaluate._models(["tuned=x"], comparison.KINDS)


@pytest.mark.parametrize(
    "changes", [{"adapter.init": "pissa"}, {"adapter.kind": "none"}, {"adapter.modules_to_save": ("norm",)}]
)
def test_the_base_of_a_run_is_the_published_one_whatever_was_trained(run, changes):
    config = configs.changed(run[1], {"adapter.modules_to_save": (), "adapter.targets": "q_proj", **changes})
    base, mesh = assemble.open_base(config.model), one_device()
    abstract, is_trained = assemble.abstract_variables(config, base.model, mesh)
    variables = assemble.load_variables(config, base, abstract)
    variables = tree.unflatten({p: x + 1 if is_trained(p) else x for p, x in tree.flatten(variables).items()})
    found = evaluate.base_variables(config, base, variables)
    published = load_params(base.reader, base.model.spec, abstract_params(base.model, mesh))
    assert set(found) == {"params"}
    for path, value in tree.flatten(found["params"]).items():
        np.testing.assert_array_equal(value, tree.flatten(published)[path])
    assert not variables
