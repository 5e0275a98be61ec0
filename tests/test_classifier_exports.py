"""Classifiers and process reward models go out to transformers and peft, and say the same there."""

import json

import jax
import numpy as np
import peft
import pytest
import torch
from support.chat_templates import CHATML, make_tokenizer
from support.pairs import config_of
from support.runs import write_model
from support.tiny import batch_of
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from ftjax import assemble, export, rewards
from ftjax.errors import UserError
from ftjax.objectives.scores import scores
from ftjax.train import train
from ftjax.weights.source import open_source

SPAM = [{"text": "The lamp is red", "label": "other"}, {"text": "Buy the lamp now", "label": "spam"}]
STEPS = {"prompt": "The red lamp", "completions": ["It is red.", "So send blue."], "labels": [True, False]}


def trained(path, rows, objective):
    """The workdir of a run on `rows` over a new model."""
    write_model(path / "model", tie_word_embeddings=False)
    make_tokenizer(CHATML, pad_token="<|im_end|>").save_pretrained(path / "model")
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"data.train": (str(path / "rows.jsonl"),), "data.checks": "off", "steps": 2, "data.max_length": 64}
    assert train(config_of(path, **given | objective), path / "run") == 0
    for format, out in (("hf", "out"), ("peft", "adapter")):
        if format == "hf":
            export.export_model(path / "run", None, format, path / out, None, "f16")
        else:
            export.export_peft(path / "run", None, path / out)
    return path / "run"


def of_run(workdir, tokens):
    """float32 [tokens, K]: what the run's head says at each token."""
    _, base, variables, _ = assemble.load_run(workdir)
    batch = batch_of([[(np.asarray(tokens, np.int32), np.ones(len(tokens), bool))]], len(tokens))
    return np.asarray(jax.jit(lambda variables: scores(base.model, variables, batch, None))(variables))[0]


def in_torch(model, tokens):
    with torch.no_grad():
        return model.eval()(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_classes_come_out_with_their_names(tmp_path, record_figure):
    run = trained(tmp_path, SPAM * 6, {"objective.name": "classify", "objective.classes": ("other", "spam")})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "other", 1: "spam"}
    assert model.config.problem_type == "single_label_classification"
    tokens = [*tokenizer.encode("Buy it now"), tokenizer.eos_token_id]
    expected = of_run(run, tokens)[-1]
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=2)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    for theirs in (model, adapted):
        found = in_torch(theirs, tokens)
        record_figure("largest difference of a logit", np.abs(found - expected).max())
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    for path in (run, tmp_path / "out"):
        with pytest.raises(UserError, match=r"not a reward model|has classes, not for a reward"):
            rewards.load(str(path))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_steps_come_out_as_classes_of_tokens(tmp_path, record_figure):
    run = trained(tmp_path, [STEPS] * 8, {"objective.name": "prm"})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "wrong", 1: "right"}
    tokens = tokenizer.encode("<|im_start|>user\nThe red lamp<|im_end|>\n<|im_start|>assistant\nIt is red.\n")
    expected = of_run(run, tokens)
    base = AutoModelForTokenClassification.from_pretrained(tmp_path / "model", num_labels=2)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    for theirs in (model, adapted):
        found = in_torch(theirs, tokens)
        record_figure("largest difference of a logit", np.abs(found - expected).max())
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.array_equal(open_source(tmp_path / "out").head(), assemble.load_run(run)[2]["heads"]["score"]["kernel"])
    with pytest.raises(UserError, match="has the head of a model ForTokenClassification, not for a reward"):
        rewards.load(str(tmp_path / "out"))
