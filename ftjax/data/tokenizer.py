"""Tokenizers: from a GGUF file's own metadata or a Hugging Face directory, and the tokens that end a turn."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ftjax.errors import UserError
from ftjax.weights.gguf_header import parse


class _Split(NamedTuple):
    """How one value of `tokenizer.ggml.pre` cuts text into pieces before the merges."""

    steps: tuple[pre_tokenizers.PreTokenizer, ...]
    normalizer: normalizers.Normalizer | None = None
    ignore_merges: bool = False  # a piece that is a whole vocabulary entry is taken without merging
    add_bos: bool = False  # where the file does not say


def _regex_split(pattern: str) -> tuple[pre_tokenizers.PreTokenizer, ...]:
    """Pieces are the matches of `pattern`; then bytes are spelled in GPT-2's alphabet."""
    return (
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    )


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
_CL100K = (  # Llama 3 takes up to three digits at a time, Qwen 2 one
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The splits of the models' own tokenizer.json files, by the name that llama.cpp's converter gives them.
_SPLITS = {
    "gpt-2": _Split((_GPT2,)),
    "llama-bpe": _Split(_regex_split(_CL100K.replace("DIGITS", "{1,3}")), ignore_merges=True, add_bos=True),
    "qwen2": _Split(_regex_split(_CL100K.replace("DIGITS", "")), normalizer=normalizers.NFC()),
    "smollm": _Split((pre_tokenizers.Digits(individual_digits=True), _GPT2)),
}
_CONTROL, _USER_DEFINED = 3, 4  # token types of the GGUF specification


def load(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer, special tokens and chat template of a `.gguf` file or of a directory with tokenizer.json.

    No network, no code from the model's directory, and no torch. `UserError` where the tokenizer is missing,
    damaged or of a kind that is not supported.
    """
    path = Path(path)
    if path.is_dir():
        return _from_directory(path)
    if path.suffix != ".gguf" or not path.is_file():
        raise UserError(f"{path}: no tokenizer there; give a .gguf file or a directory with tokenizer.json")
    return _from_gguf(path)


def check_vocab(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """`UserError` where the tokenizer has a token id that the embedding of `vocab_size` rows lacks."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer has token ids up to {largest}, the model's embedding only {vocab_size} rows (vocab_size "
            "in its config): take the tokenizer that belongs to the model, without tokens added to it"
        )


def end_tokens(tokenizer: PreTrainedTokenizerFast, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Every token id at which generation ends, without repeats.

    They are `eos_token_id` of the model's config (an int, a list or None) and of `config["generation_config"]`
    where there is one, the tokenizer's end token, and the token that the chat template writes after an
    assistant's answer. `UserError` where an id lies outside the config's `vocab_size`.
    """
    ids: list[int] = []
    for named in (config, config.get("generation_config") or {}):
        value = named.get("eos_token_id")
        ids.extend([value] if isinstance(value, int) else value or [])
    ids.extend(i for i in (tokenizer.eos_token_id, _end_of_turn(tokenizer)) if i is not None)
    for i in ids:
        if not 0 <= i < config.get("vocab_size", i + 1):
            raise UserError(f"end token id {i} lies outside vocab_size {config['vocab_size']}: correct eos_token_id")
    return tuple(dict.fromkeys(ids))


def _end_of_turn(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The special token that follows an assistant's answer, found by rendering one."""
    if not tokenizer.chat_template:
        return None
    answer = "Zebra"
    turns = [{"role": "user", "content": "Name an animal."}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template cannot render a user and an assistant turn: {error}") from error
    _, found, tail = text.rpartition(answer)
    if not found:
        raise UserError("the chat template leaves out the assistant's answer: mend the template")
    for i in tokenizer(tail, add_special_tokens=False)["input_ids"]:
        if i in tokenizer.added_tokens_decoder:
            return i
        if tokenizer.decode([i]).strip():
            return None
    return None


def _from_directory(path: Path) -> PreTrainedTokenizerFast:
    if not (path / "tokenizer.json").is_file():
        raise UserError(f"{path}: no tokenizer.json there; save the model's fast tokenizer into this directory")
    try:
        # Not AutoTokenizer: it imports torch where that is installed. tokenizer.json alone says how to tokenize.
        return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: transformers cannot load this tokenizer: {error}") from error


def _from_gguf(path: Path) -> PreTrainedTokenizerFast:
    meta = {k.removeprefix("tokenizer."): v for k, v in parse(path)[0].items() if k.startswith("tokenizer.")}
    kind, pre = meta.get("ggml.model"), meta.get("ggml.pre")
    if kind != "gpt2":
        raise UserError(
            f"{path}: tokenizer.ggml.model is {kind!r}, only 'gpt2' (byte-level BPE) can be built from a GGUF file; "
            "use the model's Hugging Face directory with tokenizer.json"
        )
    if pre not in _SPLITS:
        raise UserError(
            f"{path}: tokenizer.ggml.pre is {pre!r}, known are {', '.join(sorted(_SPLITS))}; "
            "use the model's Hugging Face directory with tokenizer.json"
        )
    split = _SPLITS[pre]
    tokens, types, merges = (_array(path, meta, key) for key in ("tokens", "token_type", "merges"))
    if len(types) != len(tokens):
        raise UserError(f"{path}: {len(tokens)} tokens but {len(types)} token types: the file is damaged")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise UserError(f"{path}: {len(tokens) - len(vocab)} tokens occur twice: the file is damaged")

    backend = Tokenizer(models.BPE(vocab, _pairs(path, merges, vocab), ignore_merges=split.ignore_merges))
    if split.normalizer:
        backend.normalizer = split.normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(split.steps))
    backend.decoder = decoders.ByteLevel()
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        add = backend.add_special_tokens if special else backend.add_tokens
        add([AddedToken(t, normalized=False, special=special) for t, kind in zip(tokens, types) if kind == wanted])

    named = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        i = meta.get(f"ggml.{key}_token_id")
        if i is not None and not 0 <= i < len(tokens):
            raise UserError(f"{path}: tokenizer.ggml.{key}_token_id is {i}, there are {len(tokens)} tokens")
        named[f"{role}_token"] = None if i is None else tokens[i]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=meta.get("chat_template"),
        add_bos_token=bool(meta.get("ggml.add_bos_token", split.add_bos)),
        add_eos_token=bool(meta.get("ggml.add_eos_token", False)),
        clean_up_tokenization_spaces=False,
        **named,
    )


def _array(path: Path, meta: Mapping[str, Any], key: str) -> list:
    value = meta.get(f"ggml.{key}")
    if not isinstance(value, list):
        raise UserError(f"{path}: tokenizer.ggml.{key} is missing; convert the model to GGUF again")
    return value


def _pairs(path: Path, merges: list[str], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Merges as pairs, each checked here because the library's own error does not name the file."""
    pairs = []
    for line, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise UserError(f"{path}: merge {line} ({merge!r}) is not about tokens of the file: the file is damaged")
        pairs.append((left, right))
    return pairs
