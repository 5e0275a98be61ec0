"""Reward models go out to transformers and peft and come back in, and score the same everywhere."""

import json
import re
import shutil

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.chat_templates import CHATML, make_tokenizer
from support.family_configs import CONFIGS
from support.pairs import config_of, write_pairs
from support.runs import command, finish, write_model, write_rows
from support.tiny import one_device
from support.torch_models import torch_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ftjax import assemble, export, exportable, rewards
from ftjax import config as configs
from ftjax.adapted import load_model
from ftjax.data import pipeline
from ftjax.errors import UserError
from ftjax.method import method_of
from ftjax.models import heads
from ftjax.objectives.scores import is_last, scores
from ftjax.train import train
from ftjax.weights.hf.classifier import TEXTS, is_there
from ftjax.weights.peft import begun_heads

REWARD = {"objective.name": "reward", "objective.ensemble": 2, "data.checks": "off", "data.max_length": 64}
CONVERSATIONS = [
    [{"role": "user", "content": "The red lamp"}, {"role": "assistant", "content": "send red"}],
    [{"role": "user", "content": "The blue lamp is broken"}, {"role": "assistant", "content": "it is red and old"}],
    [  # with the end token between turns, which pads in the base
        {"role": "user", "content": "The green lamp"},
        {"role": "assistant", "content": "send green"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "no"},
    ],
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A reward model of two heads in run/, trained for four steps over model/, and exported to hf/ and peft/."""
    path = tmp_path_factory.mktemp("reward")
    write_model(path / "model", tie_word_embeddings=False)
    make_tokenizer(CHATML, pad_token="<|im_end|>").save_pretrained(path / "model")
    write_pairs(path / "pairs.jsonl", 40)
    assert train(config_of(path, **REWARD), path / "run") == 0
    export.export_model(path / "run", None, "hf", path / "hf", None, "f16")
    export.export_peft(path / "run", None, path / "peft")
    return path


@pytest.fixture(scope="module")
def ours(root):
    return rewards.load(str(root / "run"))


@pytest.mark.parametrize("name", ["run", "hf", "peft"])
def test_the_memory_of_a_reward_model_is_known_before_it_is_read(root, name):
    config = config_of(root, **{"objective.rewards": ("exact", (f"reward:{root / name}", 0.5))})
    arrays = jax.tree.leaves(rewards.load(str(root / name)).variables)
    size = pytest.approx(sum(leaf.nbytes for leaf in arrays), rel=0.02)
    assert rewards.needed(config) == size
    pessimistic = [f"reward:{root / name}{heads}" for heads in ("", "?min", "?std=0.5")]
    assert rewards.needed(configs.changed(config, {"objective.rewards": tuple(pessimistic)})) == size, (
        "it is loaded once"
    )
    assert rewards.needed(config_of(root, **{"objective.rewards": ("exact",)})) == 0
    with pytest.raises(UserError, match=r"config.objective.rewards: reward:nowhere: .* no such"):
        rewards.needed(config_of(root, **{"objective.rewards": ("reward:nowhere",)}))


def test_a_reward_model_is_known_by_what_it_holds(root, tmp_path):
    """Wherever it lies; with another head it is another, and so is one of other weights."""

    def digest_of(path):
        named = config_of(root, **{"objective.rewards": (f"reward:{path}",)})
        ((_, digest),) = rewards.digests(named).items()
        return digest

    for name in ("run", "hf", "peft"):
        shutil.copytree(root / name, tmp_path / name)
        assert digest_of(tmp_path / name) == digest_of(root / name)
    file = tmp_path / "hf/model.safetensors"
    whole = load_file(file)
    for changed in ("score.weight", next(name for name in whole if "down_proj" in name)):
        save_file(whole | {changed: whole[changed] + 1}, file, {"format": "np"})
        assert digest_of(tmp_path / "hf") != digest_of(root / "hf")
    assert digest_of(root / "run") != digest_of(root / "hf")
    assert rewards.digests(config_of(root, **{"objective.judge": str(root / "model")})) != {}
    assert rewards.digests(config_of(root, **{"objective.judge": "https://HOST/v1"})) == {}


def raw(model, conversations):
    """Rewards before they are normalized, float64 [N, K]."""
    return model.scores(conversations) * model.std + model.mean


def in_torch(model, tokenizer, side):
    """What transformers gives for CONVERSATIONS in one batch, [N, K]."""
    tokenizer.padding_side = side
    texts = tokenizer.apply_chat_template(CONVERSATIONS, tokenize=False)
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    assert (batch["attention_mask"] == 0).any()
    with torch.no_grad():
        return model.eval()(**batch).logits.numpy()


@pytest.mark.parametrize("side", ["left", "right"])
def test_transformers_scores_the_same_whatever_side_is_padded(root, ours, record_figure, side):
    tokenizer = AutoTokenizer.from_pretrained(root / "hf")
    assert tokenizer.pad_token == "<unk>"
    assert tokenizer.eos_token == "<|im_end|>"
    model = AutoModelForSequenceClassification.from_pretrained(root / "hf")
    expected, found = raw(ours, CONVERSATIONS), in_torch(model, tokenizer, side)
    assert np.ptp(expected, axis=0).min() > 0.5  # so that another place to read it at shows
    record_figure("largest difference of a score", np.abs(found - expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_peft_scores_the_same(root, ours, record_figure):
    base = AutoModelForSequenceClassification.from_pretrained(root / "model", num_labels=2)
    model = peft.PeftModel.from_pretrained(base, root / "peft")
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    tokenizer.pad_token = "<unk>"
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # as the card says
    expected, found = raw(ours, CONVERSATIONS), in_torch(model, tokenizer, "right")
    record_figure("largest difference of a score", np.abs(found - expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_what_is_exported_is_read_as_a_reward_model_and_normalized_as_the_run_is(root, ours):
    expected = ours.scores([*CONVERSATIONS, ("The red lamp", "send red")])
    assert expected.dtype == np.float32
    np.testing.assert_array_equal(expected[3], expected[0])
    assert np.abs(ours.mean).min() > 0.01
    for name in ("hf", "peft"):
        again = rewards.load(str(root / name))
        assert (again.max_length, again.label_noise) == (64, 0.0)
        found = again.scores([*CONVERSATIONS, ("The red lamp", "send red")])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_scores_of_training_documents_are_those_of_training(root, ours, record_figure):
    """The same tokens, cut in the same place, and read at the same one; packed there, a row of its own here."""
    config, base = config_of(root, **REWARD | {"data.max_length": 36}), ours.base
    sources = configs.sources(config, "train")
    loader, _ = pipeline.load(sources, base.tokenizer, assemble.data_spec(config, base.model.spec))
    batch = loader.batch(0)
    by_token = jax.jit(lambda batch: scores(base.model, ours.variables, batch, None))(batch)
    ends = np.argwhere(np.asarray(is_last(batch["segment_ids"])))
    in_training = {tuple(_document(batch, row, at)): np.asarray(by_token)[row, at] for row, at in ends}

    rows = [json.loads(line) for line in (root / "pairs.jsonl").read_text().splitlines()]
    pairs = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    model = ours._replace(max_length=36)
    tokens = [model.tokens(pair)[:36] for pair in pairs]
    assert any(len(model.tokens(pair)) > 36 for pair in pairs)
    assert any(len(document) < 36 for document in tokens)
    found = {tuple(document): score for document, score in zip(tokens, raw(model, pairs), strict=True)}
    assert len(in_training) > 6
    apart = max(np.abs(score - found[document]).max() for document, score in in_training.items())
    record_figure("largest difference of a score", apart)
    assert apart < 1e-6 * max(np.abs(score).max() for score in in_training.values()) * 4


def _document(batch, row, end):
    """The tokens of the document that ends at a place of a batch."""
    segment = batch["segment_ids"][row]
    return batch["tokens"][row, : end + 1][segment[: end + 1] == segment[end]].tolist()


def first_head(config):
    """float32 [D, K]: the head that a run of `config` begins with."""
    base, widths = assemble.open_base(config.model), method_of(config).heads(config.objective)
    abstract = heads.abstract_heads(widths, base.model.spec, one_device())
    return begun_heads.kernel(config, base.reader, base.model.spec, abstract)


def test_a_run_begins_with_the_head_that_is_there(root, ours):
    config = config_of(root, **REWARD | {"model.source": str(root / "hf"), "adapter.kind": "none", "adapter.rank": 16})
    base = assemble.open_base(config.model)
    with jax.set_mesh(one_device()):
        abstract, _ = assemble.abstract_variables(config, base.model, one_device())
        variables = assemble.load_variables(config, base, abstract, lambda path: path.startswith(heads.COLLECTION))
    kernels = [of[heads.COLLECTION][heads.SCORE]["kernel"] for of in (variables, ours.variables)]
    assert np.array_equal(*kernels)


@pytest.mark.parametrize("given", [{"model.source": "hf"}, {"adapter.source": "peft", "adapter.rank": 16}])
def test_a_run_goes_on_from_the_head_that_was_trained(root, ours, given):
    where = {key: str(root / value) if key.endswith("source") else value for key, value in given.items()}
    trained = np.asarray(ours.variables[heads.COLLECTION][heads.SCORE]["kernel"])
    assert np.array_equal(first_head(config_of(root, **REWARD | where)), trained)
    with pytest.raises(UserError, match=r"source: .* has a head of 2 numbers, and this run's head has 3"):
        first_head(config_of(root, **REWARD | where | {"objective.ensemble": 3}))
    with pytest.raises(UserError, match=r"a head of 2 numbers \(ForSequence.*and none for tokens, which .*'dpo'"):
        first_head(config_of(root, **where))


def test_what_has_no_head_for_tokens_generates_nothing(root):
    for model, adapters in ((root / "hf", {}), (root / "model", {"it": str(root / "peft")})):
        with pytest.raises(UserError, match="is a model ForSequenceClassification, whose head gives no tokens"):
            load_model(str(model), adapters, "float32")
    with pytest.raises(UserError, match="has a head for tokens, not for a reward"):
        rewards.load(str(root / "model"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_what_transformers_and_peft_made_is_gone_on_from(root, tmp_path):
    """A directory and an adapter of theirs: `score` among the modules to save, and `classifier`, which is not there."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(root / "model", num_labels=2)
    base.save_pretrained(tmp_path / "theirs")
    make_tokenizer(CHATML).save_pretrained(tmp_path / "theirs")
    kernel = base.score.weight.detach().numpy().T.copy()
    assert np.array_equal(first_head(config_of(root, **REWARD | {"model.source": str(tmp_path / "theirs")})), kernel)
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    torch.nn.init.normal_(adapted.score.modules_to_save["default"].weight)
    adapted.save_pretrained(tmp_path / "adapter")
    found = first_head(config_of(root, **REWARD | {"adapter.source": str(tmp_path / "adapter"), "adapter.rank": 16}))
    assert np.array_equal(found, adapted.score.modules_to_save["default"].weight.detach().numpy().T)


def test_formats_that_cannot_hold_a_head_are_refused(root, tmp_path):
    with pytest.raises(UserError, match=r"has a head of numbers .*, for which a GGUF has no words; use --format hf"):
        export.export_model(root / "run", None, "gguf", tmp_path / "out.gguf", None, "f16")
    with pytest.raises(UserError, match="vLLM has no adapters of reward models"):
        export.export_peft(root / "run", None, tmp_path / "out", vllm_rank=16)
    with pytest.raises(UserError, match="there is nothing between them"):
        export.export_model(root / "run", None, "hf", tmp_path / "out", None, "f16", share=0.5)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if is_there(config["model_type"], TEXTS)])
def test_a_reward_model_of_every_family_scores_the_same_in_transformers(tmp_path, name, record_figure):
    """gemma's scaled embedding, windows, norms after attention, mixtures; the end token pads in the base."""
    positions = "n_positions" if CONFIGS[name]["model_type"] == "gpt2" else "max_position_embeddings"
    tokenizer = make_tokenizer(CHATML, pad_token="<|im_end|>")
    config = CONFIGS[name] | {"vocab_size": 400, positions: 256, "eos_token_id": tokenizer.eos_token_id}
    torch_model(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", 20)
    assert train(config_of(tmp_path, **REWARD, steps=2), tmp_path / "run") == 0
    export.export_model(tmp_path / "run", None, "merged", tmp_path / "out", "float32", "f16")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", attn_implementation="eager")
    its = AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = raw(rewards.load(str(tmp_path / "run")), CONVERSATIONS)
    assert np.ptp(expected, axis=0).min() > 0.05, "of other rows others: what agrees says something"
    # GPT-2 learned its positions, and transformers counts them from the left, padding or not.
    for side in ("left", "right") if name != "gpt2" else ("right",):
        found = in_torch(theirs, its, side)
        record_figure(f"largest difference of a score, padded on the {side}", np.abs(found - expected).max())
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    again = rewards.load(str(tmp_path / "out"))
    np.testing.assert_allclose(raw(again, CONVERSATIONS), expected, rtol=0, atol=1e-4)


def test_a_family_for_which_transformers_has_no_class_is_refused_before_the_first_step(tmp_path):
    write_model(tmp_path / "model", model_type="granite")
    config = config_of(tmp_path, **REWARD)
    base = assemble.open_base(config.model)
    variables, _ = assemble.abstract_variables(config, base.model, one_device())
    with pytest.raises(UserError, match=r"'hf' would be .*no ForSequenceClassification of the family 'granite'"):
        exportable.check(("hf",), config, base, variables)


@pytest.mark.slow
def test_rewards_of_rows_and_of_answers_in_training(root, tmp_path):
    """The commands: ftjax.score prints accuracy and calibration, and a run is evaluated by the mean reward."""
    out = tmp_path / "scored.jsonl"
    arguments = [f"--reward={root / 'run'}", f"--data={root / 'pairs.jsonl'}", f"--out={out}"]
    printed = finish(command("ftjax.score", *arguments))
    assert re.search(r"accuracy +\d+\.\d% of 40 pairs", printed)
    assert "expected error" in printed
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 40
    assert lines[0].keys() == {
        *("prompt", "chosen", "rejected", "chosen_reward", "rejected_reward", "likelihood", "disagreement")
    }
    assert "exists; name another file" in finish(command("ftjax.score", *arguments), 2)
    write_rows(tmp_path / "rows.jsonl", 12)
    given = {"objective.name": "sft", "data.train": (str(tmp_path / "rows.jsonl"),), "data.checks": "off", "steps": 2}
    score = {"source": str(tmp_path / "rows.jsonl"), "score": f"reward:{root / 'run'}"}
    config = config_of(root, **given | {"data.eval": (score,), "evaluate.max_new_tokens": 8})
    assert train(config, tmp_path / "run") == 0
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    means = [record["eval_rows/reward"] for record in records if "eval_rows/reward" in record]
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert means[-1] == pytest.approx(np.mean([line["score"] for line in samples if line["step"] == 2]), rel=1e-6)
