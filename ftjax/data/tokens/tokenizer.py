"""Tokenizers: from a GGUF file's own metadata or a Hugging Face directory, and the tokens that end a turn."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from ftjax.data.tokens import templates
from ftjax.data.tokens.rendering import TEMPLATE_ERRORS
from ftjax.errors import UserError
from ftjax.weights.gguf.tokenizer import from_gguf
from ftjax.weights.hf.files import inside

log = logging.getLogger(__name__)


def load(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer, special tokens and chat template of a `.gguf` file or of a directory with tokenizer.json.

    Uses no network, no code from the model's directory, and no torch. `UserError` where the tokenizer is missing,
    damaged or of a kind that is not supported.
    """
    path = Path(path)
    if path.is_dir():
        return _from_directory(path)
    if path.suffix != ".gguf" or not path.is_file():
        raise UserError(f"{path}: no tokenizer there; give a .gguf file or a directory with tokenizer.json")
    return from_gguf(path)


def prepare(
    tokenizer: PreTrainedTokenizerFast, chat_template: str = "", system: str = "", tokens: Sequence[str] = ()
) -> None:
    """Gives the tokenizer what a run chooses: a template (see `templates.read`), further tokens, a system prompt.

    A new token is kept whole wherever it stands in a text. One that the chat template writes is a special token, which
    may end a turn and is not shown in what is generated; the others are ordinary ones, which are.

    Raises:
      UserError: a token is there already; what `templates` raises.
    """
    if chat_template:
        tokenizer.chat_template = templates.read(chat_template, tokenizer)
    if there := [token for token in tokens if token in tokenizer.get_vocab()]:
        raise UserError(
            f"config.model.add_tokens: the tokenizer has {', '.join(map(repr, there))} already; leave out what is "
            "there (config.adapter.modules_to_save=('embed_tokens',) trains the rows of all tokens)"
        )
    template = str(tokenizer.chat_template)
    for token in tokens:
        special = token in template
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special)], special_tokens=special)
    if chat_template:
        templates.check(tokenizer, chat_template)
    if system:
        tokenizer.chat_template = templates.with_system(tokenizer, system)


def rows_needed(tokenizer: PreTrainedTokenizerFast) -> int:
    """The rows that an embedding needs for every token id."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocab(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """A warning where token ids have no row in an embedding of `vocab_size` rows.

    No error: published models have such tokenizers (Gemma 3's names an image token that its text models lack), and
    whatever uses such an id is refused.
    """
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= vocab_size)
    if beyond:
        names = ", ".join(repr(token) for _, token in beyond[:3]) + (", ..." if len(beyond) > 3 else "")
        log.warning(
            "the tokenizer has %d token id(s) beyond the %d rows of the model's embedding (%s); rows and prompts that "
            "use one are refused",
            len(beyond),
            vocab_size,
            names,
        )


def end_tokens(tokenizer: PreTrainedTokenizerFast, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Every token id at which generation ends, without repeats.

    They are `eos_token_id` of the model's config (an int, a list or None) and of its `generation_config`, the
    tokenizer's end token, and the token that the chat template writes after an assistant's answer. `UserError` where
    an id is not an int or lies outside the config's `vocab_size`.
    """
    ids: list[int] = []
    for named in (config, config.get("generation_config") or {}):
        value = named.get("eos_token_id") if isinstance(named, Mapping) else named
        values = value if isinstance(value, list) else [] if value is None else [value]
        if wrong := [value for value in values if type(value) is not int]:
            raise UserError(f"eos_token_id of the model's config is {wrong[0]!r}, not a token id or a list of them")
        ids.extend(values)
    ids.extend(i for i in (tokenizer.eos_token_id, _end_of_turn(tokenizer)) if i is not None)
    for i in ids:
        if not 0 <= i < config.get("vocab_size", i + 1):
            raise UserError(f"end token id {i} lies outside vocab_size {config['vocab_size']}: correct eos_token_id")
    return tuple(dict.fromkeys(ids))


def _end_of_turn(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The special token that follows an assistant's answer, read off a rendered conversation; None without one."""
    if not tokenizer.chat_template:
        return None
    answer = "Zebra"
    turns = [{"role": "user", "content": "Name an animal."}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except TEMPLATE_ERRORS as error:
        raise UserError(f"the chat template cannot render a user and an assistant turn: {error}") from error
    if answer not in text:
        raise UserError("the chat template leaves out the assistant's answer: correct the template")
    tail = text.rpartition(answer)[2]
    for i in tokenizer(tail, add_special_tokens=False)["input_ids"]:
        if i in tokenizer.added_tokens_decoder:
            return i
        if tokenizer.decode([i]).strip():
            return None
    return None


def _from_directory(path: Path) -> PreTrainedTokenizerFast:
    if not inside(path, "tokenizer.json").is_file():
        raise UserError(f"{path}: no tokenizer.json there; save the model's fast tokenizer into this directory")
    try:
        # Not AutoTokenizer: it imports torch where that is installed. tokenizer.json alone says how to tokenize.
        return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: transformers cannot load this tokenizer: {error}") from error
