"""The end tokens of an export: wherever generation stops in the run, it stops in what reads the files too."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from ftjax.models.families import text_config


def with_ends(config: Mapping[str, Any], ends: Sequence[int], vision: bool = False) -> dict[str, Any]:
    """The config of the language model with all of `ends` as its `eos_token_id`, a list where there are several.

    vision: of the whole of a multimodal model instead.
    """
    config = dict(config) if vision else text_config(dict(config))
    return config | ({"eos_token_id": list(ends) if len(ends) > 1 else ends[0]} if ends else {})


def unnamed(config: Mapping[str, Any], ends: Sequence[int]) -> list[int]:
    """Those of `ends` that a base's own config and generation config do not name, so that others run past them."""
    named = text_config(dict(config)).get("eos_token_id")
    return [end for end in ends if end not in (named if isinstance(named, list) else [named])]


def with_end_of_turn(
    tokenizer: PreTrainedTokenizerFast, config: Mapping[str, Any], ends: Sequence[int]
) -> PreTrainedTokenizerFast:
    """The tokenizer, with the end of the template's turns as its eos_token where the base names that token nowhere.

    Much software knows one end token, the tokenizer's (llama.cpp's converter, transformers' reader of GGUF files). The
    tokenizer stays as it is where another eos_token would change a rendered chat, or what it adds to a text.
    """
    of_template = [end for end in unnamed(config, ends) if end != tokenizer.eos_token_id]
    if not of_template:
        return tokenizer
    ending = copy.deepcopy(tokenizer)
    ending.eos_token = tokenizer.convert_ids_to_tokens(of_template[-1])
    return ending if _writes(ending) == _writes(tokenizer) else tokenizer


def _writes(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], str]:
    turns = [{"role": "user", "content": "Hi there."}, {"role": "assistant", "content": "Hello!"}] * 2
    chat = tokenizer.apply_chat_template(turns, tokenize=False) if tokenizer.chat_template else ""
    return tokenizer("a")["input_ids"], chat
