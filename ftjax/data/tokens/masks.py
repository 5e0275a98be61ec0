"""Which tokens of a rendered conversation are whose: each turn's span, from the template and never from a search.

A span comes from the template's `{% generation %}` markers, or from rendering the conversation up to the turn (with the
generation prompt, as in inference) and through it, and comparing the tokens. The whole is tokenized once: the tokens of
such a prefix are those of the whole as far as the last special token in it, since text is split there before anything
else happens to it, and what follows that token is tokenized again, alone. Where a prefix has no special token, or its
text is not how the whole begins, it is tokenized from its start.
"""

import bisect
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ftjax.data.format.conversation import REASONING
from ftjax.data.tokens.rendering import TEMPLATE_ERRORS, for_template, render, template_of, template_refuses, traits
from ftjax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def turns(
    messages: list[dict],
    wanted: list[int],
    tokenizer: "PreTrainedTokenizerFast",
    origin: str,
    tools: list[dict] | None = None,
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of a conversation, and the span [start, stop) of each of its assistant turns in `wanted`.

    A span is what the model writes when it is given the conversation before the turn: content, tool calls, and the
    token that ends the turn. Turns that are not wanted are not looked at: a template may rewrite those.

    Raises:
      UserError: a wanted turn that cannot be told apart, that is written otherwise once the conversation goes on, that
        has no end token, or of which the template leaves something out.
    """
    marked = _MARKER.search(template_of(tokenizer, origin, tools))
    whole = _Whole(messages, tokenizer, origin, tools)
    _check_context(whole)
    spans = _marked(whole, wanted) if marked else _compared(whole, wanted)
    for i, (_, _, text) in zip(wanted, spans, strict=True):
        _check_turn(whole, i, text)
    return whole.tokens, [(start, stop) for start, stop, _ in spans]


def without(
    messages: list[dict],
    left_out: list[int],
    tokenizer: "PreTrainedTokenizerFast",
    origin: str,
    tools: list[dict] | None = None,
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of a conversation, and the spans of all of it but the messages `left_out` (with their headers)."""
    whole = _Whole(messages, tokenizer, origin, tools)
    _check_context(whole)
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i not in left_out:
            _check_turn(whole, i, whole.text)
    kept = np.ones(len(whole.tokens), bool)
    for i in left_out:
        edges = []
        for k in (i, i + 1):
            text = render(messages[:k], tokenizer, origin, tools) if 0 < k < len(messages) else whole.text if k else ""
            edge = whole.common(*whole.prefixes([text])[0]) if text else 0
            if edge is None:
                raise UserError(
                    f"{origin}: message {i} has weight 0, but the chat template rewrites what comes before it or the "
                    "message as the conversation goes on, so its tokens cannot be told apart; leave out the weight, "
                    "or set data.train_on to assistant"
                )
            edges.append(edge)
        kept[slice(*edges)] = False
    edges = np.flatnonzero(np.diff(kept, prepend=False, append=False)).tolist()
    return whole.tokens, list(zip(edges[::2], edges[1::2], strict=True))


def encode(texts: list[str], tokenizer, add_special_tokens: bool = False) -> list[list[int]]:
    # verbose=False: a text longer than the tokenizer's model_max_length is cut by max_length later.
    return tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"] if texts else []


class _Whole:
    """A rendered conversation: text, tokens and, for each token, the characters it stands for."""

    def __init__(self, messages, tokenizer, origin, tools):
        self.messages, self.tokenizer, self.origin, self.tools = messages, tokenizer, origin, tools
        self.traits = traits(tokenizer)
        self.text = render(messages, tokenizer, origin, tools)
        encoded = tokenizer(self.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        self.tokens, self.offsets = encoded["input_ids"], encoded["offset_mapping"]
        self._borders = [i for i, token in enumerate(self.tokens) if token in self.traits.borders]
        self._border_ends = [self.offsets[i][1] for i in self._borders]

    def prefixes(self, texts: list[str]) -> list[tuple[int, list[int]]]:
        """For each text (kept, rest): its tokens are those of the whole as far as `kept`, and then `rest`."""
        kept = []
        pieces = {}  # the distinct texts to tokenize: most turns have the same header
        for text in texts:
            k = bisect.bisect_right(self._border_ends, len(text)) - 1 if self.text.startswith(text) else -1
            border = self._borders[k] if k >= 0 else None
            kept.append(border)
            piece = text if border is None else self.text[self.offsets[border][0] : len(text)]
            pieces[piece] = None
        encoded = dict(zip(pieces, encode(list(pieces), self.tokenizer), strict=True))
        found = []
        for text, border in zip(texts, kept, strict=True):
            if border is not None:
                rest = encoded[self.text[self.offsets[border][0] : len(text)]]
                if rest and rest[0] == self.tokens[border]:
                    found.append((border, rest))
                    continue
            found.append((0, encoded[text] if text in encoded else encode([text], self.tokenizer)[0]))
        return found

    def agrees(self, kept: int, rest: list[int]) -> int | None:
        """The number of tokens of a prefix, if the whole begins with them."""
        stop = kept + len(rest)
        return stop if self.tokens[kept:stop] == rest else None

    def common(self, kept: int, rest: list[int]) -> int | None:
        """The number of tokens of a prefix that the whole begins with, if only end tokens and white space follow."""
        pairs = zip(rest, self.tokens[kept:], strict=False)
        same = next(
            (i for i, (one, other) in enumerate(pairs) if one != other), min(len(rest), len(self.tokens) - kept)
        )
        closing = [token for token in rest[same:] if token not in self.traits.ends]
        return None if self.tokenizer.decode(closing).strip() else kept + same


def _compared(whole: _Whole, wanted: list[int]) -> list[tuple[int, int, str]]:
    """(start, stop, text) of each wanted turn, by comparing the tokens of prefixes.

    Prefixes, not single messages: templates put in a BOS or a default system prompt where a conversation starts.
    """
    messages, origin = whole.messages, whole.origin
    texts = []
    for i in wanted:
        texts.append(render(messages[:i], whole.tokenizer, origin, whole.tools, generation_prompt=True))
        last = i + 1 == len(messages)
        texts.append(whole.text if last else render(messages[: i + 1], whole.tokenizer, origin, whole.tools))
    prefixes = whole.prefixes(texts)
    spans = []
    for k, i in enumerate(wanted):
        before, through = texts[2 * k : 2 * k + 2]
        start = whole.agrees(*prefixes[2 * k])
        kept, rest = prefixes[2 * k + 1]
        if start is None:
            raise UserError(_why_no_prefix(whole.text, before, through, i, origin))
        low = min(start, kept)
        tokens = whole.tokens[low:kept] + rest  # of the text through the turn, from `low` on
        tokens = _without_next_prompt(tokens, start - low, whole.tokens[:start], whole)
        stops = _ends_of_turn(tokens, start - low, len(tokens), whole)
        # Of several end tokens the whole may have the first only: Phi 3 closes a conversation with another one.
        fits = [stop for stop in stops or [start - low] if tokens[:stop] == whole.tokens[low : low + stop]]
        if not fits:
            raise UserError(_why_no_prefix(whole.text, before, through, i, origin))
        if not stops:
            raise UserError(
                f"{origin}: message {i} (assistant) is rendered without an end-of-turn token (a special token of the "
                "tokenizer), so the model would never learn to stop; end the turn with one in the chat template"
            )
        stop = low + fits[0]
        if stop == start + 1:
            raise UserError(f"{origin}: message {i} (assistant) is rendered empty; correct the chat template")
        spans.append((start, stop, through[len(before) :]))
    return spans


def _why_no_prefix(full: str, before: str, through: str, i: int, origin: str) -> str:
    if through.startswith(before) and full.startswith(through):
        return (
            f"{origin}: message {i} (assistant) starts or ends with characters that the tokenizer merges with "
            "the template's own; strip the white space around its content, or end the template's generation prompt "
            "and assistant turn with a special token or a single line break"
        )
    return (
        f"{origin}: the chat template rewrites what comes before or in message {i} (assistant) as the conversation "
        "goes on (or its generation prompt is not how it writes the turn), so training would not see what inference "
        "sees; set data.train_on to last, put {% generation %} markers around the template's assistant turns, or split "
        "the row by answer"
    )


def _marked(whole: _Whole, wanted: list[int]) -> list[tuple[int, int, str]]:
    """(start, stop, text) of each wanted turn, by the template's `{% generation %}` markers."""
    origin, ends = whole.origin, whole.traits.ends
    given = for_template(whole.messages, whole.tokenizer, origin, whole.tools)
    try:
        encoded = whole.tokenizer.apply_chat_template(
            given,
            tools=whole.tools,
            chat_template=template_of(whole.tokenizer, origin, whole.tools),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
    except TEMPLATE_ERRORS as error:
        raise template_refuses(origin, error) from error
    tokens, offsets = encoded["input_ids"], whole.offsets
    if tokens != whole.tokens:
        raise UserError(f"{origin}: the chat template renders the same conversation in two ways; correct it")
    mask = np.asarray(encoded["assistant_masks"], np.int8)
    edges = np.flatnonzero(np.diff(mask, prepend=0, append=0)).tolist()
    spans = []
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        # The mask ends with the first token of the block's last character, which may have several (an emoji's bytes).
        while stop < len(tokens) and offsets[stop][0] < offsets[stop][1] and offsets[stop] == offsets[stop - 1]:
            stop += 1
        # Markers may close just before the end-of-turn token, or after the line break that follows it.
        if stop < len(tokens) and tokens[stop] in ends and not _ends_of_turn(tokens, start, stop, whole):
            stop += 1
        stop = next(iter(_ends_of_turn(tokens, start, stop, whole)), None)
        if stop is None:
            raise UserError(
                f"{origin}: assistant turn {len(spans)} has no end-of-turn token (a special token of the "
                "tokenizer) inside or just after the template's {% generation %} block; put it there"
            )
        spans.append((start, stop, whole.text[offsets[start][0] : offsets[stop - 1][1]]))
    turns = [i for i, message in enumerate(whole.messages) if message["role"] == "assistant"]
    # A tokenizer that trims white space from its offsets lets a span run on into the next turn, or loses it.
    if len(spans) != len(turns):
        raise UserError(
            f"{origin}: the chat template's {{% generation %}} markers give {len(spans)} spans for {len(turns)} "
            "assistant turns; in the template put one block around each turn, through its end-of-turn token"
        )
    return [spans[turns.index(i)] for i in wanted]


def _without_next_prompt(tokens: list[int], start: int, before: list[int], whole: _Whole) -> list[int]:
    """The tokens through a turn, without a generation prompt after its end: Llama 3's first template always wrote one.

    It is what follows an end token and is also how `before`, the prompt of this turn, ends.
    """
    for stop in range(start + 1, len(tokens)):
        if tokens[stop - 1] in whole.traits.ends and before[stop - len(tokens) :] == tokens[stop:]:
            return tokens[:stop]
    return tokens


def _ends_of_turn(tokens: list[int], start: int, stop: int, whole: _Whole) -> list[int]:
    """Where the turn tokens[start:stop] may end, the last place first: after each end token that only other end tokens
    and white space follow (as the line break after ChatML's <|im_end|>, which the model need not learn)."""
    found = []
    for i in range(stop - 1, start - 1, -1):
        if tokens[i] in whole.traits.ends:
            found.append(i + 1)
        elif whole.tokenizer.decode([tokens[i]]).strip():
            break
    return found


def _check_context(whole: _Whole) -> None:
    """Tools and all messages but the assistant's are in the text: templates leave out what they do not know.

    White space is not compared, here and in the turns, since templates trim it. Words like SmolLM3's "/no_think", which
    the template itself knows, are switches that it may take out.
    """
    text = _squeezed(whole.text)
    template = template_of(whole.tokenizer, whole.origin, whole.tools)
    for i, message in enumerate(whole.messages):
        content = message["content"]
        if message["role"] == "assistant" or _squeezed(content) in text:
            continue
        if _squeezed(json.dumps(content, ensure_ascii=False)[1:-1]) in text:  # how some write what a tool said
            continue
        if "".join(one for one in content.split() if one[0] != "/" or one not in template) in text:
            continue
        raise UserError(
            f"{whole.origin}: the chat template leaves out message {i} ({message['role']}), or part of it; remove the "
            "message, or take a template that renders it"
        )
    lost = [tool["function"]["name"] for tool in whole.tools or () if tool["function"]["name"] not in whole.text]
    if lost:
        raise UserError(
            f"{whole.origin}: the chat template leaves out the tool {lost[0]!r}; take a template that renders `tools`, "
            "or describe them in a system message and remove the field"
        )


def _check_turn(whole: _Whole, i: int, text: str) -> None:
    """All of a turn that is trained is in its text. (Earlier thoughts, which are not trained, may well be dropped.)"""
    message = whole.messages[i]
    text = _squeezed(text)
    reasoning = next((message[key] for key in REASONING if key in message), "")
    calls = [call["function"] for call in message.get("tool_calls", ())]
    names = [call["name"] for call in calls]
    what = {"content": [message["content"]], "tool call": names, "reasoning": [reasoning]}
    lost = next((kind for kind, parts in what.items() for part in parts if _squeezed(part) not in text), None)
    if not lost and any(not _is_written(value, text) for call in calls for value in _leaves(call["arguments"])):
        lost = "arguments of a tool call"
    if lost:
        raise UserError(
            f"{whole.origin}: the chat template leaves out some of the {lost} of message {i} (assistant), so the model "
            "would never learn it (templates drop <think> blocks, or text beside tool calls); remove it from the row, "
            "or take a template that renders it"
        )


def _leaves(value: object) -> Iterator[str | int | float]:
    """The strings and numbers in nested dicts and lists, keys among them; true, false and null have many spellings."""
    if isinstance(value, dict | list):
        if isinstance(value, dict):
            yield from value
        for one in value.values() if isinstance(value, dict) else value:
            yield from _leaves(one)
    elif value is not None and not isinstance(value, bool):
        yield value


def _is_written(value: str | int | float, squeezed: str) -> bool:
    """Whether a value stands in a text: as it is, in JSON, or in JSON that is a string of JSON itself."""
    forms = [str(value)]
    for ascii_only in (False, True):
        once = _quoted(value, ascii_only) if isinstance(value, str) else json.dumps(value)
        forms += [once, _quoted(once, ascii_only)]
    return any(_squeezed(form) in squeezed for form in forms)


def _quoted(text: str, ascii_only: bool) -> str:
    return json.dumps(text, ensure_ascii=ascii_only)[1:-1]


def _squeezed(text: str) -> str:
    return "".join(text.split())
