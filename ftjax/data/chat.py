"""Rows -> tokens and loss masks through the tokenizer's own chat template.

Loss falls on assistant turns, each with the token that ends it. Where a turn begins and ends is never searched for in
the text: it comes from the template's `{% generation %}` markers, or from rendering the conversation up to the turn
(with the generation prompt, as in inference) and through it, and comparing the tokens.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jinja2
import numpy as np

from ftjax.data import formats
from ftjax.data.example import Example, Row
from ftjax.errors import UserError

if TYPE_CHECKING:  # importing transformers takes a second, and only annotations need it here
    from transformers import PreTrainedTokenizerFast

_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def tokenize(row: Row, tokenizer: "PreTrainedTokenizerFast", vocab_size: int | None = None) -> Example:
    """The example of one row.

    - text: its tokens (with a BOS only where the tokenizer adds one itself) and an eos; all trained but the first,
      which nothing predicts.
    - messages: the rendered conversation; assistant turns are trained, unless their `weight` is 0.
    - prompt/completion as lists of messages: one conversation; only the completion's assistant turns are trained.
    - prompt/completion as strings: with a chat template one user turn and one assistant turn, without one the plain
      text of both and an eos; the completion and what ends it are trained.

    Args:
      vocab_size: rows of the model's embedding; every token must be below it. None: not checked.

    Raises:
      UserError: with the row's origin; a bad row, or a template whose assistant turns cannot be told apart.
    """
    return _tokenize(row, tokenizer, _end_tokens(tokenizer), vocab_size)


def tokenize_all(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerFast",
    max_length: int,
    max_dropped: float = 0.05,
    vocab_size: int | None = None,
) -> tuple[list[Example], dict]:
    """The examples of all rows, cut at max_length from the right; those left with no trained token are dropped.

    Returns:
      The examples (at least one), and a report of ints: rows, examples, truncated, dropped, tokens, trained_tokens,
      longest (before the cut).

    Raises:
      UserError: what `tokenize` raises; no rows; more than the fraction max_dropped of the rows dropped.
    """
    if max_length < 2:
        raise UserError(f"data.max_length = {max_length}: needs room for a token and its target; set it to 2 or more")
    if not rows:
        raise UserError("no rows to tokenize; name a data source that has some")
    ends = _end_tokens(tokenizer)
    examples, dropped = [], []
    report = dict.fromkeys(("rows", "examples", "truncated", "dropped", "tokens", "trained_tokens", "longest"), 0)
    for row in rows:
        example = _tokenize(row, tokenizer, ends, vocab_size)
        length = len(example.tokens)
        report["longest"] = max(report["longest"], length)
        if length > max_length:
            report["truncated"] += 1
            example = Example(example.tokens[:max_length], example.trained[:max_length], example.origin)
        if not example.trained.any():
            dropped.append(f"{row.origin} ({length} tokens)")
            continue
        examples.append(example)
        report["tokens"] += len(example.tokens)
        report["trained_tokens"] += int(example.trained.sum())
    report |= {"rows": len(rows), "examples": len(examples), "dropped": len(dropped)}
    if len(dropped) > max_dropped * len(rows) or not examples:
        raise UserError(
            f"{len(dropped)} of {len(rows)} rows have no trained token within max_length = {max_length} (at most "
            f"{max_dropped:.0%} may be dropped), for example {', '.join(dropped[:3])}; raise data.max_length "
            f"(the longest row has {report['longest']} tokens), shorten the prompts or remove the rows"
        )
    return examples, report


def render_prompt(messages: list[dict] | str, tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """int32 [n]: the tokens that a model is given to answer, exactly those before the answer in training.

    Args:
      messages: a conversation, rendered with the generation prompt; or the string of a prompt/completion row's prompt.
    """
    origin = "the prompt"
    if isinstance(messages, str):
        if not tokenizer.chat_template:
            tokens = _encode([messages], tokenizer, add_special_tokens=True)[0]
            return _checked(tokens, origin, tokenizer, None)
        messages = [{"role": "user", "content": messages}]
    formats.check_messages(messages, origin, needs_assistant=False)
    text = _render(messages, tokenizer, origin, generation_prompt=True)
    return _checked(_encode([text], tokenizer)[0], origin, tokenizer, None)


def _tokenize(row: Row, tokenizer, ends: frozenset[int], vocab_size: int | None) -> Example:
    fields = formats.check_row(row.fields, row.origin).fields
    if "text" in fields:
        tokens = _with_eos(_encode([fields["text"]], tokenizer, add_special_tokens=True)[0], tokenizer, row.origin)
        spans = [(1, len(tokens))]
    elif isinstance(fields.get("prompt"), str) and not tokenizer.chat_template:
        tokens, spans = _plain_completion(fields["prompt"], fields["completion"], tokenizer, row.origin)
    else:
        messages = _conversation(fields)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        find = _marked_turns if _MARKER.search(_template(tokenizer, row.origin)) else _compared_turns
        tokens, turn_spans = find(messages, turns, tokenizer, ends, row.origin)
        spans = [span for i, span in zip(turns, turn_spans, strict=True) if messages[i].get("weight") != 0]
    tokens = _checked(tokens, row.origin, tokenizer, vocab_size)
    trained = np.zeros(len(tokens), bool)
    for start, stop in spans:
        trained[start:stop] = True
    return Example(tokens, trained, row.origin)


def _conversation(fields: dict) -> list[dict]:
    if "messages" in fields:
        return fields["messages"]
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return [{**message, "weight": 0} for message in prompt] + completion


def _plain_completion(prompt: str, completion: str, tokenizer, origin: str) -> tuple[list[int], list[tuple[int, int]]]:
    before, joint = _encode([prompt, prompt + completion], tokenizer, add_special_tokens=True)
    if joint[: len(before)] == before:
        tokens = joint
    else:
        # A token of the joint text spans the border. In inference the prompt is tokenized alone, so here too.
        tokens = before + _encode([completion], tokenizer)[0]
        if tokenizer.decode(tokens) != tokenizer.decode(joint):
            raise UserError(
                f"{origin}: the tokenizer cannot split the text between prompt and completion; move the "
                "space between them to the start of the completion"
            )
    tokens = _with_eos(tokens, tokenizer, origin)
    return tokens, [(len(before), len(tokens))]


def _compared_turns(messages, turns, tokenizer, ends, origin):
    """Tokens of the conversation and the span of each assistant turn, by comparing tokens of whole prefixes.

    Prefixes, not single messages: templates put in a BOS or a default system prompt where a conversation starts.
    """
    texts = [_render(messages, tokenizer, origin)]
    for i in turns:
        texts.append(_render(messages[:i], tokenizer, origin, generation_prompt=True))
        texts.append(_render(messages[: i + 1], tokenizer, origin))
    distinct = list(dict.fromkeys(texts))  # through the last turn is often the whole
    tokens = dict(zip(distinct, _encode(distinct, tokenizer), strict=True))
    full = tokens[texts[0]]
    spans = []
    for k, i in enumerate(turns):
        before, through = tokens[texts[2 * k + 1]], tokens[texts[2 * k + 2]]
        start = len(before)
        stop = _end_of_turn(through, start, len(through), tokenizer, ends)
        if through[:start] != before or (stop is not None and full[:stop] != through[:stop]):
            raise UserError(_why_no_prefix(texts, k, i, origin))
        if stop is None:
            raise UserError(
                f"{origin}: message {i} (assistant) is rendered without an end-of-turn token (a special token of the "
                "tokenizer), so the model would never learn to stop; end the turn with one in the chat template"
            )
        if stop == start + 1:
            raise UserError(f"{origin}: message {i} (assistant) is rendered empty; correct the chat template")
        spans.append((start, stop))
    return full, spans


def _why_no_prefix(texts: list[str], k: int, i: int, origin: str) -> str:
    full, before, through = texts[0], texts[2 * k + 1], texts[2 * k + 2]
    if through.startswith(before) and full.startswith(through):
        return (
            f"{origin}: message {i} (assistant) starts or ends with characters that the tokenizer merges with "
            "the template's own; strip the white space around its content, or end the template's generation prompt "
            "and assistant turn with a special token or a single line break"
        )
    return (
        f"{origin}: the chat template rewrites what comes before or in message {i} (assistant) as the conversation "
        "goes on (or its generation prompt is not how it writes the turn), so training would not see what inference "
        "sees; put {% generation %} markers around the template's assistant turns, or split the row by answer"
    )


def _marked_turns(messages, turns, tokenizer, ends, origin):
    """Tokens of the conversation and the span of each assistant turn, by the template's `{% generation %}` markers."""
    try:
        encoded = tokenizer.apply_chat_template(
            _for_template(messages),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
        )
    except jinja2.TemplateError as error:
        raise _template_refuses(origin, error) from error
    tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
    mask = np.asarray(encoded["assistant_masks"], np.int8)
    edges = np.flatnonzero(np.diff(mask, prepend=0, append=0)).tolist()
    spans = []
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        # The mask ends with the first token of the block's last character, which may have several (an emoji's bytes).
        while stop < len(tokens) and offsets[stop][0] < offsets[stop][1] and offsets[stop] == offsets[stop - 1]:
            stop += 1
        # Markers may close just before the end-of-turn token, or after the line break that follows it.
        if stop < len(tokens) and tokens[stop] in ends and _end_of_turn(tokens, start, stop, tokenizer, ends) is None:
            stop += 1
        stop = _end_of_turn(tokens, start, stop, tokenizer, ends)
        if stop is None:
            raise UserError(
                f"{origin}: assistant turn {len(spans)} has no end-of-turn token (a special token of the "
                "tokenizer) inside or just after the template's {% generation %} block; put it there"
            )
        spans.append((start, stop))
    # A tokenizer that trims white space from its offsets lets a span run on into the next turn, or loses it.
    if len(spans) != len(turns):
        raise UserError(
            f"{origin}: the chat template's {{% generation %}} markers give {len(spans)} spans for {len(turns)} "
            "assistant turns; in the template put one block around each turn, through its end-of-turn token"
        )
    return tokens, spans


def _end_of_turn(tokens: list[int], start: int, stop: int, tokenizer, ends: frozenset[int]) -> int | None:
    """One past the end-of-turn token of the turn tokens[start:stop]: its last special token, if only white space
    (as the line break after ChatML's <|im_end|>, which the model need not learn) follows."""
    last = next((i for i in range(stop - 1, start - 1, -1) if tokens[i] in ends), None)
    if last is None or (last + 1 < stop and tokenizer.decode(tokens[last + 1 : stop]).strip()):
        return None
    return last + 1


def _end_tokens(tokenizer) -> frozenset[int]:
    """Tokens that can end a turn: eos and every special token but BOS, padding and unknown."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    special -= {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    if tokenizer.eos_token_id is not None:  # may double as the padding or BOS token
        special.add(tokenizer.eos_token_id)
    return frozenset(special)


def _template(tokenizer, origin: str) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            f"{origin}: the tokenizer has no chat template to render messages with; take an "
            "instruction-tuned model, add chat_template to its tokenizer_config.json, or use rows of "
            "text or of prompt/completion strings"
        )
    return tokenizer.get_chat_template()


def _for_template(messages: list[dict]) -> list[dict]:
    return [{k: v for k, v in message.items() if k != "weight" and v is not None} for message in messages]


def _render(messages: list[dict], tokenizer, origin: str, generation_prompt: bool = False) -> str:
    _template(tokenizer, origin)  # or a clear message that there is none
    try:
        return tokenizer.apply_chat_template(
            _for_template(messages), tokenize=False, add_generation_prompt=generation_prompt
        )
    except jinja2.TemplateError as error:
        raise _template_refuses(origin, error) from error


def _template_refuses(origin: str, error: jinja2.TemplateError) -> UserError:
    return UserError(f"{origin}: the chat template refuses the conversation: {error}; change the order of its roles")


def _encode(texts: list[str], tokenizer, add_special_tokens: bool = False) -> list[list[int]]:
    # verbose=False: a text longer than the tokenizer's model_max_length is cut by max_length later.
    return tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]


def _with_eos(tokens: list[int], tokenizer, origin: str) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise UserError(f"{origin}: the tokenizer has no eos_token; set it in tokenizer_config.json")
    return tokens if tokens and tokens[-1] == tokenizer.eos_token_id else [*tokens, tokenizer.eos_token_id]


def _checked(tokens: list[int], origin: str, tokenizer, vocab_size: int | None) -> np.ndarray:
    bos = tokenizer.bos_token_id
    if bos is not None and tokens[:2] == [bos, bos]:
        raise UserError(
            f"{origin}: starts with two BOS tokens ({tokenizer.bos_token!r}); remove it from the text or "
            "the chat template, since it is added once already"
        )
    array = np.asarray(tokens, np.int32)
    if vocab_size is not None and array.size and array.max() >= vocab_size:
        raise UserError(
            f"{origin}: token {array.max()} is beyond the model's vocabulary of {vocab_size}; "
            "use the tokenizer that belongs to the model"
        )
    return array
