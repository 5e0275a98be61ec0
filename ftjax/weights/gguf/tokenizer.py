"""The tokenizer in a GGUF file: byte-level BPE ("gpt2" there) and SentencePiece's BPE ("llama")."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from ftjax.errors import UserError
from ftjax.weights.gguf.header import read_header


class PreTokenization(NamedTuple):
    """How a value of `tokenizer.ggml.pre` splits text into pieces, inside which the merges are made."""

    steps: tuple[pre_tokenizers.PreTokenizer, ...]
    normalizer: normalizers.Normalizer | None = None
    ignore_merges: bool = False  # a piece that is in the vocabulary is one token, whatever the merges
    add_bos: bool = False  # the default for files without `add_bos_token`

    def backend(
        self, vocab: Mapping[str, int] | None = None, merges: Sequence[tuple[str, str]] | None = None
    ) -> Tokenizer:
        """A byte-level BPE that splits text in this way; without a decoder and added tokens."""
        backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=self.ignore_merges))
        if self.normalizer:
            backend.normalizer = self.normalizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(list(self.steps))
        return backend


def _regex_split(pattern: str) -> tuple[pre_tokenizers.PreTokenizer, ...]:
    """Pieces are the matches of `pattern`; then bytes are spelled in GPT-2's alphabet."""
    return (
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    )


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
_DIGITS_APART = (pre_tokenizers.Digits(individual_digits=True), _GPT2)
_ENDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CL100K = (  # Llama 3 takes up to three digits at a time, Qwen 2 one
    _ENDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _regex_split(_CL100K.replace("DIGITS", "{1,3}"))
_O200K = (  # words end where small letters are followed by capitals
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+ENDS"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*ENDS"
    r"|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = PreTokenization(_regex_split(_CL100K.replace("DIGITS", "")), normalizer=normalizers.NFC())
# As in the models' own tokenizer.json files, by the name that llama.cpp's converter gives them.
PRE_TOKENIZATIONS = {
    "gpt-2": PreTokenization((_GPT2,)),
    "llama-bpe": PreTokenization(_LLAMA3, ignore_merges=True, add_bos=True),
    "dbrx": PreTokenization(_LLAMA3),
    "smaug-bpe": PreTokenization(_LLAMA3),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "smollm": PreTokenization(_DIGITS_APART),
    "refact": PreTokenization(_DIGITS_APART),
    "starcoder": PreTokenization(_DIGITS_APART),
    "tekken": PreTokenization(
        _regex_split(_O200K.replace("ENDS", "").replace("DIGITS", "")), ignore_merges=True, add_bos=True
    ),
    "gpt-4o": PreTokenization(_regex_split(_O200K.replace("ENDS", f"{_ENDS}?").replace("DIGITS", "{1,3}"))),
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types of the GGUF specification
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # Hugging Face's names -> GGUF's
_LONGEST_PIECE = 1000  # characters; finding the two halves of a piece takes time that grows with the square


def from_gguf(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a GGUF file.

    Raises UserError for a kind of tokenizer that is not supported, by name, and for a damaged file.
    """
    return from_metadata(path, read_header(path)[0])


def from_metadata(path: Path, metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of a file's {key: value}; `path` is for messages."""
    meta = {k.removeprefix("tokenizer."): v for k, v in metadata.items() if k.startswith("tokenizer.")}
    kind = meta.get("ggml.model")
    tokens, types = _array(path, meta, "tokens", str), _array(path, meta, "token_type", int)
    if len(types) != len(tokens):
        raise UserError(f"{path}: {len(tokens)} tokens but {len(types)} token types: the file is damaged")
    roles = _roles(path, meta, tokens, {"bos": 1, "eos": 2, "unk": 0} if kind == "llama" else {})
    if kind == "gpt2":
        backend, add_bos = _byte_level(path, meta, tokens)
    elif kind == "llama":
        gemma = str(metadata.get("general.architecture")).startswith("gemma")
        backend, tokens = _sentencepiece(path, meta, tokens, gemma, roles["unk_token"])
        add_bos = True
    else:
        raise UserError(
            f"{path}: tokenizer.ggml.model is {kind!r}, only 'gpt2' (byte-level BPE) and 'llama' (SentencePiece's BPE) "
            "can be built from a GGUF file; use the model's Hugging Face directory with tokenizer.json"
        )
    for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
        add = backend.add_special_tokens if special else backend.add_tokens
        add([AddedToken(t, normalized=False, special=special) for t, kind in zip(tokens, types) if kind == wanted])
    template = meta.get("chat_template")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{path}: tokenizer.chat_template is not a text: the file is damaged")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        add_bos_token=_flag(path, meta, "add_bos_token", add_bos),
        add_eos_token=_flag(path, meta, "add_eos_token", False),
        clean_up_tokenization_spaces=False,
        **roles,
    )


def _byte_level(path: Path, meta: Mapping[str, Any], tokens: list[str]) -> tuple[Tokenizer, bool]:
    """(tokenizer without added tokens, whether it adds a BOS token where the file does not say)"""
    pre = meta.get("ggml.pre")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZATIONS:
        raise UserError(
            f"{path}: tokenizer.ggml.pre is {pre!r}, known are {', '.join(sorted(PRE_TOKENIZATIONS))}; "
            "use the model's Hugging Face directory with tokenizer.json"
        )
    vocab = _vocab(path, tokens)
    backend = PRE_TOKENIZATIONS[pre].backend(vocab, _pairs(path, _array(path, meta, "merges", str), vocab))
    backend.decoder = decoders.ByteLevel()
    return backend, PRE_TOKENIZATIONS[pre].add_bos


def _sentencepiece(
    path: Path, meta: Mapping[str, Any], tokens: list[str], gemma: bool, unknown: str
) -> tuple[Tokenizer, list[str]]:
    """(tokenizer without added tokens, tokens as they are spelled in it).

    A space is put before the text and after every special token, as llama.cpp does and as the tokenizer.json files of
    Llama 2, TinyLlama and Mistral say, unless `add_space_prefix` is false (Gemma).
    """
    scores = _array(path, meta, "scores", float)
    if len(scores) != len(tokens) or not all(math.isfinite(score) for score in scores):
        raise UserError(f"{path}: the scores are not one number for each of {len(tokens)} tokens: the file is damaged")
    if (longest := max(map(len, tokens), default=0)) > _LONGEST_PIECE:
        raise UserError(f"{path}: a token of {longest} characters: the file is damaged")
    if gemma:  # its runs of spaces are spelled with spaces in the file
        tokens = ["▁" * len(token) if len(token) > 1 and not token.strip(" ") else token for token in tokens]
    vocab = _vocab(path, tokens)
    model = models.BPE(vocab, spm_merges(tokens, scores, gemma), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    prefix = _flag(path, meta, "add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend, tokens


def is_run(token: str) -> bool:
    """Whether a token of SentencePiece's is a run of two or more spaces."""
    return len(token) > 1 and not token.strip("▁")


def spm_merges(tokens: Sequence[str], scores: Sequence[float], gemma: bool) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the best token first, as SentencePiece merges them.

    The scores of Gemma's files do not follow the order of its merges. The order of its tokens does, but for runs of
    spaces, which come first, the longest before all: 40 spaces are 31 and 9.
    """
    best = dict(zip(tokens, scores))
    if gemma:
        best = {token: len(token) if is_run(token) else -i for i, token in enumerate(tokens)}
    return generate_merges({token: i for i, token in enumerate(tokens)}, best)


def _roles(path: Path, meta: Mapping[str, Any], tokens: list[str], defaults: dict[str, int]) -> dict[str, str | None]:
    """{"bos_token": its text or None, ...}"""
    named = {}
    for role, key in ROLES.items():
        i = meta.get(f"ggml.{key}_token_id", defaults.get(role))
        if i is not None and (type(i) is not int or not 0 <= i < len(tokens)):
            raise UserError(f"{path}: tokenizer.ggml.{key}_token_id is {i}, there are {len(tokens)} tokens")
        named[f"{role}_token"] = None if i is None else tokens[i]
    return named


def _array(path: Path, meta: Mapping[str, Any], key: str, kind: type) -> list:
    value = meta.get(f"ggml.{key}")
    if not isinstance(value, list):
        raise UserError(f"{path}: tokenizer.ggml.{key} is missing; convert the model to GGUF again")
    if not all(type(item) is kind for item in value):
        raise UserError(f"{path}: tokenizer.ggml.{key} is not an array of {kind.__name__}: the file is damaged")
    return value


def _flag(path: Path, meta: Mapping[str, Any], key: str, default: bool) -> bool:
    value = meta.get(f"ggml.{key}", default)
    if not isinstance(value, bool):
        raise UserError(f"{path}: tokenizer.ggml.{key} is {value!r}, not true or false: the file is damaged")
    return value


def _vocab(path: Path, tokens: list[str]) -> dict[str, int]:
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise UserError(f"{path}: {len(tokens) - len(vocab)} tokens occur twice: the file is damaged")
    return vocab


def _pairs(path: Path, merges: list[str], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Merges as pairs, checked here because the library's own error does not name the file."""
    pairs = []
    for line, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if not left or not right or not {left, right, left + right} <= vocab.keys():
            raise UserError(f"{path}: merge {line} ({merge!r}) is not of tokens in the file: the file is damaged")
        pairs.append((left, right))
    return pairs
