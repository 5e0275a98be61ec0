"""Reward models go out to transformers and peft and come back in, and score the same everywhere."""

import json

import numpy as np
import peft
import pytest
import torch
from support.pairs import config_of, write_pairs
from support.runs import write_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ftjax import export
from ftjax.train import train

CONVERSATIONS = [
    [{"role": "user", "content": "The red lamp"}, {"role": "assistant", "content": "send red"}],
    [{"role": "user", "content": "The blue lamp is broken"}, {"role": "assistant", "content": "it is red and old"}],
    [
        {"role": "user", "content": "The green lamp"},
        {"role": "assistant", "content": "send green"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "no"},
    ],
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A reward model of two heads in run/, trained for four steps over model/."""
    path = tmp_path_factory.mktemp("reward")
    write_model(path / "model", tie_word_embeddings=False)
    write_pairs(path / "pairs.jsonl", 40)
    config = config_of(path, **{"objective.name": "reward", "objective.ensemble": 2, "data.checks": "off"})
    assert train(config, path / "run") == 0
    return path


def test_it(root):
    export.export_model(root / "run", None, "hf", root / "hf", None, "f16")
    export.export_peft(root / "run", None, root / "peft")
    print(sorted(p.name for p in (root/"hf").iterdir()))
    print((root/"hf/config.json").read_text(), (root/"hf/README.md").read_text(), (root/"hf/parity.json").read_text()[:900])
    print((root/"peft/adapter_config.json").read_text(), (root/"peft/README.md").read_text(), (root/"peft/ftjax_adapter.json").read_text())
    m = AutoModelForSequenceClassification.from_pretrained(root/"hf")
    tok = AutoTokenizer.from_pretrained(root/"hf")
    b = tok.apply_chat_template(CONVERSATIONS, tokenize=False)
    i = tok(b, add_special_tokens=False, padding=True, return_tensors="pt")
    print(i, m(**i).logits)
    b = AutoModelForSequenceClassification.from_pretrained(root/"model", num_labels=2)
    p = peft.PeftModel.from_pretrained(b, root/"peft")
    p.config.get_text_config().pad_token_id = tok.pad_token_id
    print(p(**i).logits)
    assert 0
