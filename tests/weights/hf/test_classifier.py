"""What transformers calls models with a head of numbers, and what pads their texts."""

import pytest
from support.chat_templates import CHATML, make_tokenizer
from transformers.models.auto import modeling_auto

from ftjax.errors import UserError
from ftjax.models.families import FAMILIES
from ftjax.weights.hf.classifier import TEXTS, TOKENS, architecture
from ftjax.weights.hf.padding import padding_token


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        (TEXTS, modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        (TOKENS, modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    ],
)
def test_every_family_has_the_name_that_transformers_has_for_it(kind, theirs):
    for family in FAMILIES.keys() - {"gemma3"}:  # of which the language model alone is written
        if family in theirs:
            assert architecture(family, kind) == theirs[family]
        else:
            with pytest.raises(UserError, match=f"transformers has no {kind} of the family '{family}'"):
                architecture(family, kind)


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
