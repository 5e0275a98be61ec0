"""What training does to general text and to the task's prompts is measured against what it started from."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from support.chat_templates import CHATML, make_tokenizer
from support.pairs import FRESH
from support.runs import write_model, write_rows
from support.tiny import CONFIG, one_device
from support.witness import torch_llama, torch_logits

from ftjax import assemble, lora, resume, tree
from ftjax import config as configs
from ftjax.data import pipeline
from ftjax.errors import UserError
from ftjax.evals import forgetting, general
from ftjax.evals.general import Text
from ftjax.evals.intervals import interval
from ftjax.evals.likelihood import Item
from ftjax.objectives.reference import REFERENCE, policy_and_reference

WORDS = ("color", "shape")
CHANGES = {
    "fresh LoRA": {},
    "DoRA": {"adapter.kind": "dora", "adapter.targets": "q_proj"},
    "full": {"adapter.kind": "none"},
    "PiSSA": {"adapter.init": "pissa"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("general")
    write_model(root / "model")
    write_rows(root / "train.jsonl", 4)
    write_rows(root / "eval.jsonl", 8, seed=1)
    texts = [{"text": f"a {word} and {i} more of them", "category": word} for i in range(3) for word in WORDS]
    (root / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return root


def config_of(root, **changes):
    config = configs.defaults()
    given = {
        "model.source": str(root / "model"),
        "model.dtype": "float32",
        "model.param_dtype": "float32",
        "model.remat": "none",
        "accumulate": 1,
        "data.train": (str(root / "train.jsonl"),),
        "data.eval": (str(root / "eval.jsonl"),),
        "data.max_length": 64,
        "data.batch_size": 4,
        "mesh.fsdp": 1,
        "optimizer.learning_rate": 3e-2,
        "steps": 3,
        "evaluate.general": (str(root / "texts.jsonl"),),
    }
    config.update_from_flattened_dict(given | changes)
    configs.validate(config)
    return config


def moved(config):
    """(base, held-out loader, metrics before and after what is trained moves, the variables then, those loaded)."""
    base = assemble.open_base(config.model)
    spec = assemble.data_spec(config, base.model.spec)
    heldout, _ = pipeline.load(configs.sources(config, "eval"), base.tokenizer, spec)
    watch = forgetting.Watch(config, base, forgetting.prompts_of(heldout), lambda done, total: None)
    loaded = []

    def begin(variables):
        loaded.append(jax.tree.map(np.asarray, variables))
        watch.begin(variables)

    with jax.set_mesh(one_device()):
        program = assemble.program(config, base.model, one_device(), config.steps)
        start = resume.start(FRESH, config, base, program, Path(), None, "", begin)
        before, rng = watch(0, start.state.trainable, start.frozen), np.random.default_rng(0)
        noisy = lambda leaf: leaf + np.float32(0.1) * rng.standard_normal(leaf.shape, np.float32)  # noqa: E731
        trainable = jax.tree.map(noisy, start.state.trainable)
        return base, heldout, before, watch(1, trainable, start.frozen), tree.combine(trainable, start.frozen), *loaded


def log_probs(variables, tokens):
    """float64 [n, vocab]: those of transformers with the adapters of `variables` merged."""
    params = lora.merge(variables["params"], variables["lora"]) if "lora" in variables else variables["params"]
    logits = torch_logits(torch_llama(CONFIG | {"vocab_size": 400, "max_position_embeddings": 512}, params), tokens)
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("fresh LoRA", "full", "PiSSA")]


@pytest.mark.parametrize("name", ["DoRA", *SLOW])
def test_loss_change_and_divergence_are_those_of_transformers(name, root):
    base, heldout, before, after, variables, loaded = moved(config_of(root, **CHANGES[name]))
    tuned = jax.tree.map(np.asarray, policy_and_reference(variables)[0])

    def loss(variables, word):
        texts = [f"a {word} and {i} more of them" for i in range(3)]
        ids = [np.asarray(base.tokenizer(text)["input_ids"]) for text in texts]
        each = [-log_probs(variables, its)[np.arange(len(its) - 1), its[1:]].mean() for its in ids]
        return np.mean(each)

    for word in WORDS:
        assert before[f"eval_general/{word}"] == pytest.approx(loss(loaded, word), abs=1e-5)
        assert after[f"eval_general/{word}"] == pytest.approx(loss(tuned, word), abs=1e-5)
    assert before["eval_general/change"] == 0
    mean = np.mean([loss(tuned, word) - loss(loaded, word) for word in WORDS])
    assert abs(mean) > 0.01
    assert after["eval_general/change"] == pytest.approx(mean, abs=1e-5)
    assert after["eval_general/loss"] - before["eval_general/loss"] == pytest.approx(mean, abs=1e-5)

    config = config_of(root, **CHANGES[name])
    ours = {key: part for key, part in variables.items() if key != REFERENCE}  # as `load_run` has them
    prompts = forgetting.prompts_of(heldout)
    with jax.set_mesh(one_device()):
        texts = general.read(configs.general_sources(config), base.tokenizer, 512)
        reference = forgetting.reference_of(config, base, ours)
        found = forgetting.forgetting(base, ours, reference, texts, prompts)
    assert json.loads(json.dumps(found)) == found
    assert [its["name"] for its in found["categories"]] == list(WORDS)
    for its in found["categories"]:
        assert its["base"] == pytest.approx(loss(loaded, its["name"]), abs=1e-5)
        assert its["tuned"] == pytest.approx(loss(tuned, its["name"]), abs=1e-5)
    assert found["change"] == pytest.approx(mean, abs=1e-5)
    assert found["interval"][0] <= found["change"] <= found["interval"][1]

    each = []
    for prompt in prompts:
        assert base.tokenizer.decode(prompt).endswith("assistant\n")  # up to where the answer begins
        log_p, log_q = (log_probs(its, prompt[-forgetting.LONGEST :])[:-1] for its in (loaded, tuned))
        each.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
    assert found["kl"] == pytest.approx(np.concatenate(each).mean(), abs=1e-5)
    if name == "full":  # of which no copy is kept during training
        assert "eval_general/kl" not in before | after
    else:
        assert before["eval_general/kl"] == 0
        assert after["eval_general/kl"] == pytest.approx(found["kl"], abs=1e-5)


def test_general_text_within_a_budget_is_of_every_category_first():
    texts = [Text(name, "", Item([1], range(2, 2 + size))) for name, size in (("a", 9), ("a", 9), ("b", 30), ("c", 5))]
    chosen = general.within(texts, 27, longest=12)
    assert [(text.category, text.tokens) for text in chosen] == [("a", 9), ("b", 11)]
    assert [text.category for text in general.within(texts, 28, longest=12)] == ["a", "b", "c"]
    assert len(general.within(texts, 1, longest=12)) == 1


@pytest.mark.parametrize("longest", [3, 10, 19])
def test_what_is_too_long_keeps_the_end_of_the_context_and_the_beginning_of_the_continuation(longest):
    context, continuation = general.shortened(Item(range(10), range(10, 20)), longest)
    assert len(context) + len(continuation) == longest
    assert list(context) == list(range(10 - len(context), 10))
    assert list(continuation) == list(range(10, 10 + len(continuation)))
    assert len(context) == max(longest // 2, longest - 10)


def test_what_ships_is_text_of_several_kinds_and_languages():
    rows = [json.loads(line) for line in (general.FOLDER / "texts.jsonl").read_text().splitlines()]
    assert len({row["text"] for row in rows}) == len(rows) == 81
    assert len({row["language"] for row in rows}) == 11
    counts = {name: sum(row["category"] == name for row in rows) for name in {row["category"] for row in rows}}
    assert len(counts) == 18
    assert min(counts.values()) >= 3
    assert not set(counts) & set(general.OF_ALL)
    sizes = [len(row["text"].encode()) for row in rows]
    assert min(sizes) > 400
    assert max(sizes) < 1200


def test_the_interval_of_the_mean_is_that_of_scipy_and_of_one_value_alone_there_is_none():
    changes = np.random.default_rng(0).normal(0.1, 0.2, 40)
    low, high = interval(changes)
    half = 1.96 * changes.std(ddof=1) / 40**0.5
    assert low == pytest.approx(changes.mean() - half, abs=0.01)
    assert high == pytest.approx(changes.mean() + half, abs=0.01)
    assert interval(np.zeros(3)) == [0, 0]
    assert interval(np.ones(1)) is None


@pytest.mark.parametrize(
    ("change", "bounds", "said"),
    [
        (0.02, [0.01, 0.03], "+0.020 nats per token [+0.010, +0.030], most in code (+0.110): little was forgotten"),
        (0.02, [-0.01, 0.05], "most in code (+0.110): no forgetting can be told from chance"),
        (0.1, [0.05, 0.15], "something was forgotten"),
        (0.3, [0.2, 0.4], "much was forgotten"),
        (-0.1, [-0.2, 0.0], "nothing was forgotten"),
    ],
)
def test_the_verdict(change, bounds, said):
    categories = [{"name": "news", "base": 2.0, "tuned": 2.0}, {"name": "code", "base": 2.0, "tuned": 2.11}]
    found = {"categories": categories, "change": change, "interval": bounds}
    assert forgetting.verdict(found).endswith(said)
    lost = {"name": "multiple choice", "base": 0.6, "tuned": 0.4, "interval": [-0.3, -0.1]}
    same = {"name": "instructions", "base": 0.6, "tuned": 0.5, "interval": [-0.3, 0.1]}
    text = forgetting.verdict(found | {"abilities": [lost, same]})
    assert text.endswith(f"{said}; worse at multiple choice 60% -> 40%")


def read(path, rows, **options):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return general.read([{"source": str(path), **options}], make_tokenizer(CHATML), 64)


def test_of_a_conversation_the_last_answer_is_measured_and_the_source_is_its_category(tmp_path):
    turns = [("user", "The red lamp"), ("assistant", "send red"), ("user", "and?"), ("assistant", "send blue")]
    (text,) = read(tmp_path / "talk.jsonl", [{"messages": [{"role": role, "content": words} for role, words in turns]}])
    decode = make_tokenizer(CHATML).decode
    assert decode(text.item.context).endswith("<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n")
    assert decode(text.item.continuation) == "send blue<|im_end|>"
    assert (text.category, text.language) == ("talk", "")


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ({"text": "The lamp"}, {"weight": 2.0}, "is measured, which knows no 'weight'; leave it out"),
        ({"text": "The lamp", "category": "kl"}, {}, "x.jsonl:1: the category 'kl' has the name of a metric"),
        ({"text": "T"}, {}, "x.jsonl:1: the text is a single token"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {}, "x.jsonl:1: is a row of preference; general text is"),
    ],
)
def test_what_is_no_general_text_is_refused(row, options, said, tmp_path):
    with pytest.raises(UserError, match=said):
        read(tmp_path / "x.jsonl", [row], **options)
