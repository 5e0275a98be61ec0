"""A tokenizer as the metadata of a GGUF file, and a check that the file gives the same tokens."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ftjax.errors import UserError
from ftjax.weights.gguf.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZATIONS,
    ROLES,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    is_run,
    spm_merges,
)

_ADVICE = "export the Hugging Face format instead, whose tokenizer.json holds everything"
_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
_MOST_ADDED = 500  # the most added tokens that are tried one by one
# Tokens at which llama.cpp ends whatever the file says (`special_eog_ids` in its llama-vocab.cpp).
_KNOWN_ENDS = {"<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>"}
_SAMPLES = (
    "Hello, world! It's 12345 and 3.14; we'll can't WON'T y2k CamelCase HTTPServer snake_case",
    "  two spaces\tand a tab,\n\n a newline \r\n   and more   \n",
    "def f(x):\n    return x**2  # ½² 0x1F\n",
    "Zürich naïve café e\u0301a\u0308 œuvre ß ﬁ Å \u00a0 \u3000 … — “quotes”",
    "漢字かな交じり文 中文測試 한국어 שלום مرحبا नमस्ते ไทย ελληνικά кириллица",
    "🙂👩‍👩‍👧‍👦🇸🇪 €£¥ \u200b\u200d \x00\x7f 𝔘",
    "aaaaaaaaaaaaaaaa 1234567890123 ................ ________  --  ==",
    "▁ lower block ▁▁",
    f"a{' ' * 40}b{' ' * 199}",
    " ",
    "",
)


def to_metadata(tokenizer: PreTrainedTokenizerFast, config: Mapping[str, Any]) -> dict[str, Any]:
    """{"tokenizer.ggml.model": ..., ...}: vocabulary, merges or scores, special tokens, chat template.

    `config` is the model's: `vocab_size` (rows of the embedding that no token belongs to become [PADn]), `model_type`,
    and the token ids that the tokenizer does not name itself, further end tokens among them.

    UserError for a tokenizer that is neither byte-level BPE with a pre-tokenizer that GGUF has a name for nor BPE as in
    SentencePiece; `check_same` notices other differences.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise UserError(f"a tokenizer of type {model['type']} cannot be written to a GGUF file; {_ADVICE}")
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    rows = config["vocab_size"]
    _check_rows(by_id, rows, tokenizer)
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(rows)]
    if len(set(tokens)) != rows:
        raise UserError(f"the tokenizer has tokens like [PAD0], which are GGUF's names of unused rows; {_ADVICE}")
    added = {entry["id"]: entry for entry in described["added_tokens"] if entry["id"] < rows}
    for entry in added.values():
        if entry["lstrip"] or entry["rstrip"] or entry["single_word"]:
            raise UserError(
                f"the added token {entry['content']!r} takes spaces around it or stands alone only, which a GGUF file "
                f"cannot say; {_ADVICE}"
            )
    types = [_type(i, added, by_id, model) for i in range(rows)]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        metadata = _sentencepiece(described, tokens, types, merges, config["model_type"])
    else:
        metadata = {"model": "gpt2", "pre": _pre(tokenizer.backend_tokenizer), "merges": [" ".join(m) for m in merges]}
    metadata = {"tokens": tokens, "token_type": types} | metadata | _special(tokenizer, config)
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()} | _templates(tokenizer)


def check_same(read: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast) -> None:
    """UserError, with the text, if the tokenizer `read` from GGUF metadata gives other ids than the original.

    Compared on prose, code, numbers, spaces and scripts, with special tokens and without, on every added token (500 at
    most) inside a text, and on a chat.
    """
    added = [str(token) for i, token in tokenizer.added_tokens_decoder.items() if i < len(read)][:_MOST_ADDED]
    texts = [*_SAMPLES, *(f"a{token}b {token} c" for token in added), *_chat(tokenizer)]
    for text in texts:
        for special in (True, False):
            ours, theirs = (t(text, add_special_tokens=special)["input_ids"] for t in (tokenizer, read))
            if ours != theirs:
                raise UserError(
                    f"a GGUF file cannot hold this tokenizer: {text!r} is {tokenizer.convert_ids_to_tokens(ours)}, of "
                    f"the file {read.convert_ids_to_tokens(theirs)}; {_ADVICE}"
                )


def _chat(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    if not tokenizer.chat_template:
        return []
    turns = [{"role": "user", "content": "Hi there."}, {"role": "assistant", "content": "Hello!"}] * 2
    try:
        return [tokenizer.apply_chat_template(turns, tokenize=False)]
    except (jinja2.TemplateError, ValueError):  # a template with demands of its own, which is kept as it is
        return []


def _check_rows(by_id: Mapping[int, str], rows: int, tokenizer: PreTrainedTokenizerFast) -> None:
    """UserError where a token beyond the embedding's rows is more than an added one that the model cannot use anyway,
    such as the image token in the tokenizer of Gemma 3 1B. A file has no place for it."""
    beyond = {i for i in by_id if i >= rows}
    named = {getattr(tokenizer, f"{role}_token_id") for role in ROLES}
    if needed := beyond - tokenizer.added_tokens_decoder.keys() | beyond & named:
        raise UserError(
            f"the tokenizer has token ids up to {max(needed)}, the embedding only {rows} rows: take the tokenizer that "
            "belongs to the model"
        )


def _type(i: int, added: Mapping[int, Mapping[str, Any]], by_id: Mapping[int, str], model: Mapping[str, Any]) -> int:
    if i not in by_id:
        return UNUSED
    if by_id[i] == model.get("unk_token") and model.get("byte_fallback"):
        return UNKNOWN
    if i in added:
        return CONTROL if added[i]["special"] else USER_DEFINED
    if model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", by_id[i]):
        return BYTE
    return NORMAL


def _special(tokenizer: PreTrainedTokenizerFast, config: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of special tokens, and which of them are put around a text."""
    ids = {f"{key}_token_id": getattr(tokenizer, f"{role}_token_id") for role, key in ROLES.items()}
    for key, name in (("bos_token_id", "bos_token_id"), ("padding_token_id", "pad_token_id")):
        if ids[key] is None:
            ids[key] = config.get(name)
    of_config = config.get("eos_token_id")
    ends = [ids["eos_token_id"], *(of_config if isinstance(of_config, list) else [of_config])]
    first, *others = list(dict.fromkeys(end for end in ends if end is not None)) or [None]
    # Keys for those that llama.cpp does not know by their text, where it has no key for all.
    others.sort(key=lambda end: tokenizer.convert_ids_to_tokens(end) in _KNOWN_ENDS)
    if unknown := [end for end in others[2:] if tokenizer.convert_ids_to_tokens(end) not in _KNOWN_ENDS]:
        raise UserError(
            f"llama.cpp reads three end tokens of a GGUF file and knows some more by name; the model has "
            f"{tokenizer.convert_ids_to_tokens([first, *others])}, of which it would miss "
            f"{tokenizer.convert_ids_to_tokens(unknown)}: shorten eos_token_id in the model's generation_config.json"
        )
    ids |= {f"{key}_token_id": end for key, end in zip(("eos", "eot", "eom"), (first, *others))}
    several = {"eos_token_ids": [first, *others]} if others else {}  # as Ollama reads them
    around = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    return (
        {key: value for key, value in ids.items() if value is not None}
        | several
        | {
            "add_bos_token": len(around) > len(plain) and around[0] == tokenizer.bos_token_id,
            "add_eos_token": len(around) > len(plain) and around[-1] == tokenizer.eos_token_id,
        }
    )


def _templates(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    template = tokenizer.chat_template
    if not template:
        return {}
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    named = {f"tokenizer.chat_template.{name}": text for name, text in template.items() if name != "default"}
    default = {"tokenizer.chat_template": template["default"]} if "default" in template else {}
    return default | named | {"tokenizer.chat_templates": [key.rpartition(".")[2] for key in named]}


def _pre(backend: Tokenizer) -> str:
    """The key of PRE_TOKENIZATIONS by which the tokenizer splits text."""
    wanted = _described(backend)
    for name, pre_tokenization in PRE_TOKENIZATIONS.items():
        if _described(pre_tokenization.backend()) == wanted:
            return name
    raise UserError(
        "this tokenizer splits text in a way for which GGUF files have no name here (known are "
        f"{', '.join(sorted(PRE_TOKENIZATIONS))}); {_ADVICE}"
    )


def _described(backend: Tokenizer) -> tuple:
    """All that decides into which pieces a text is split: normalizers, pre-tokenizers and the BPE's own switches."""
    described = json.loads(backend.to_str())
    model = described["model"]
    switches = bool(model.get("ignore_merges")), *(model.get(name) or "" for name in _AFFIXES)
    steps = _flat(described["normalizer"], "normalizers"), _flat(described["pre_tokenizer"], "pretokenizers")
    # `trim_offsets` changes character offsets, which nothing here uses, and no ids.
    return switches, [[{k: v for k, v in step.items() if k != "trim_offsets"} for step in part] for part in steps]


def _flat(component: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    if component is None:
        return []
    if component["type"] == "Sequence":
        return [step for part in component[inner] for step in _flat(part, inner)]
    return [component]


def _sentencepiece(
    described: Mapping[str, Any],
    tokens: Sequence[str],
    types: Sequence[int],
    merges: Sequence[tuple[str, str]],
    model_type: str,
) -> dict[str, Any]:
    """Scores are the negated ranks of the merges that make a token, so the earliest merged is the best."""
    gemma = model_type.startswith("gemma")
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    scores = [
        0.0 if kind in (BYTE, CONTROL, UNKNOWN) else -float(ranks.get(token, len(merges) + i))
        for i, (token, kind) in enumerate(zip(tokens, types))
    ]
    added = {token for token, kind in zip(tokens, types) if kind in (CONTROL, USER_DEFINED, UNKNOWN)}
    # A merge that makes an added token never happens: the token is taken out of the text first. But for runs of "▁":
    # those are taken out where a text has "▁" itself, and spaces become "▁" later.
    added = {token for token in added if not is_run(token)}
    implied = [pair for pair in spm_merges(tokens, scores, gemma) if "".join(pair) not in added]
    actual = [pair for pair in merges if "".join(pair) not in added]
    pieces = [list(dict.fromkeys("".join(pair) for pair in pairs)) for pairs in (implied, actual)]
    if set(implied) != set(actual) or pieces[0] != pieces[1]:
        raise UserError(
            "the merges of this tokenizer are not those that SentencePiece would make of its vocabulary, which is all "
            f"that a GGUF file holds of them; {_ADVICE}"
        )
    steps = [step["type"] for step in _flat(described["normalizer"], "normalizers")]
    pre_steps = _flat(described["pre_tokenizer"], "pretokenizers")
    metaspace = next((step["prepend_scheme"] for step in pre_steps if step["type"] == "Metaspace"), "never")
    respelled = [
        " " * len(token) if gemma and kind == USER_DEFINED and is_run(token) else token
        for token, kind in zip(tokens, types)
    ]
    return {
        "model": "llama",
        "pre": "default",
        "tokens": respelled,
        "scores": scores,
        "add_space_prefix": "Prepend" in steps or metaspace != "never",
    }
