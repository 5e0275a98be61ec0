"""What transformers calls models with a head of numbers, and what pads their texts."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from support.chat_templates import CHATML, make_tokenizer
from support.family_configs import CONFIGS, LANGUAGE_MODELS
from support.tiny import batch_of, one_device
from support.torch_models import torch_model
from transformers import AutoConfig, AutoModelForTokenClassification
from transformers.models.auto import modeling_auto

from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.models.families import FAMILIES, spec_from_config
from ftjax.models.params import abstract_params
from ftjax.objectives.scores import scores
from ftjax.weights.hf.classifier import TEXTS, TOKENS, Head, architecture, is_there
from ftjax.weights.hf.padding import padding_token
from ftjax.weights.hf.together import new_directory_together
from ftjax.weights.hf.write import write_model
from ftjax.weights.load import load_params
from ftjax.weights.source import open_source


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        (TEXTS, modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        (TOKENS, modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    ],
)
def test_every_family_has_the_name_that_transformers_has_for_it(kind, theirs):
    for family in LANGUAGE_MODELS:  # of which the language model alone is written
        if family in theirs:
            assert architecture(family, kind) == theirs[family]
        else:
            with pytest.raises(UserError, match=f"transformers has no {kind} of the family '{family}'"):
                architecture(family, kind)
    for family in FAMILIES:
        assert is_there(family, kind) is (family in theirs), family


def test_no_document_ends_with_the_token_that_pads():
    def chosen(specials, ends, **names):
        tokenizer = make_tokenizer(CHATML, specials=["<unk>", *specials, "<|im_start|>", "<|im_end|>"], **names)
        found = padding_token(tokenizer, [tokenizer.convert_tokens_to_ids(end) for end in ends], 400)
        return found if found is None else tokenizer.convert_ids_to_tokens(found)

    end = ["<|im_end|>"]
    assert chosen(["<pad>"], end, pad_token="<pad>") == "<pad>"
    assert chosen(["<pad>"], end, pad_token="<|im_end|>") == "<pad>"  # pads in the base, and ends turns
    assert chosen(["<|fim_pad|>"], [*end, "<unk>"]) == "<|fim_pad|>"
    assert chosen([], end) == "<unk>"
    assert chosen(["<|reserved|>"], [*end, "<unk>"]) == "<|reserved|>"  # which no template writes
    assert chosen([], [*end, "<unk>"], bos="<|im_start|>") == "<|im_start|>"  # which only begins
    assert chosen([], [*end, "<unk>", "<|im_start|>"]) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])  # whose head for tokens is called `classifier`
def test_a_head_for_every_token_is_one_in_transformers(tmp_path, name, record_figure):
    """It has a bias there, which transformers leaves at random where the files have none."""
    reference = torch_model(CONFIGS[name] | {"tie_word_embeddings": False})
    reference.save_pretrained(tmp_path / "base")
    reader = open_source(tmp_path / "base")
    spec = dataclasses.replace(spec_from_config(reader.config), tie_word_embeddings=True)
    model = Decoder(spec)
    kernel = np.random.default_rng(0).standard_normal((spec.hidden_size, 2)).astype(np.float32)
    params = load_params(WithoutHead(reader), spec, abstract_params(model, one_device()))
    head = Head(kernel, ("wrong", "right"), of_tokens=True, facts={"method": "prm"})
    with new_directory_together(tmp_path / "out") as directory:
        write_model(directory, params, spec, reader.config, head=head)
    tokens = np.random.default_rng(1).integers(0, 61, (1, 9))
    batch = batch_of([[(tokens[0].astype(np.int32), np.ones(9, bool))]], 9)
    variables = {"params": params, "heads": {"score": {"kernel": kernel}}}
    expected = np.asarray(jax.jit(lambda variables: scores(model, variables, batch, None))(variables))
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert theirs.config.id2label == {0: "wrong", 1: "right"}
    with torch.no_grad():
        found = theirs(torch.tensor(tokens)).logits.numpy()
    record_figure("largest difference of a logit", np.abs(found - expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    again = open_source(tmp_path / "out")
    assert (again.kind, again.width()) == (TOKENS, 2)
    assert np.array_equal(again.head(), kernel)
    assert "lm_head.weight" not in again.names()


class WithoutHead:
    """A reader whose files have no output head."""

    def __init__(self, reader):
        self.path, self.config = reader.path, reader.config | {"tie_word_embeddings": True}
        self.shape, self.dtype, self.read, self._names = reader.shape, reader.dtype, reader.read, reader.names()

    def names(self):
        return self._names - {"lm_head.weight"}


def test_a_head_with_a_bias_is_refused(tmp_path):
    config = AutoConfig.for_model(**CONFIGS["llama"])
    model = AutoModelForTokenClassification.from_config(config)
    torch.nn.init.ones_(model.score.bias)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"score.bias is not zero, and heads have no bias here"):
        open_source(tmp_path).head()
