"""Which tokens of a rendered conversation belong to which message. The template decides, never a search in the text.

The span of a turn comes from the template's `{% generation %}` markers, where it has them. Elsewhere the conversation
is rendered up to the turn (with the generation prompt, as in inference) and through it, and the tokens of these two
prefixes are compared with those of the whole.

Tokenizing every prefix from its start would take time quadratic in the number of turns, so only the whole conversation
is tokenized in full. Tokenizers split text at special tokens before they do anything else. So up to its last special
token, its border, a prefix has the tokens of the whole, and only the text from there on is tokenized again. A prefix
without a special token, or one that the text of the whole does not begin with, is tokenized from its start.

Templates of models that think may open the thought in the generation prompt ("<think>\\n") and leave thoughts out of
the conversation that they render. There the answer is put behind the prompt as the model would write it.
"""

import bisect
import json
import re
from collections.abc import Iterator

import numpy as np

from ftjax.data.format.conversation import REASONING
from ftjax.data.format.images import MARK
from ftjax.data.tokens.rendering import Messages, Tokenizer, Tools, apply_template, render, template_of, traits
from ftjax.errors import UserError

_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_OPENED = re.compile(r"<think>\s*$")  # at the end of a generation prompt: the model goes on with its thoughts
_CLOSED = "</think>"

Span = tuple[int, int]  # [start, stop) in tokens
_Turn = tuple[int, int, str]  # the span of a turn, and its text


class Rewritten(UserError):
    """A turn is rendered in another way once the conversation goes on; while it is the last it may be all right."""


class _Merged(UserError):
    """The tokenizer merges characters of a turn with the template's own."""


def turns(
    messages: Messages, wanted: list[int], tokenizer: Tokenizer, origin: str, tools: Tools = None
) -> tuple[list[int], list[Span]]:
    """Tokens of a conversation, and the span of each of its assistant turns in `wanted`.

    A span is what the model writes when it is given the conversation before the turn: content, tool calls, and the
    token that ends the turn. Other turns are not checked, because a template may rewrite those.

    Args:
      wanted: indices into `messages`, ascending.
      origin: file:line of the row, for messages.

    Raises:
      Rewritten: a wanted turn that is rendered differently once the conversation goes on.
      UserError: a wanted turn whose tokens cannot be separated from the rest, that has no end token, or of which the
        template leaves something out.
    """
    whole = _Rendered(messages, tokenizer, origin, tools)
    _check_context(whole)
    try:
        spans = _marked(whole, wanted) if _MARKER.search(whole.template) else _compared(whole, wanted)
    except (Rewritten, _Merged) as error:
        if not any(_opening(whole, i) for i in wanted):
            raise
        if len(wanted) > 1:  # each answer alone may do
            raise Rewritten(str(error)) from error
        tokens, span = _thinking(whole, wanted[0])
        return tokens, [span]
    for i, (_, _, text) in zip(wanted, spans, strict=True):
        opening = _opening(whole, i) if whole.messages[i]["content"].lstrip().startswith("<think>") else ""
        _check_turn(whole, i, opening + text)
    return whole.tokens, [(start, stop) for start, stop, _ in spans]


def without(
    messages: Messages, left_out: list[int], tokenizer: Tokenizer, origin: str, tools: Tools = None
) -> tuple[list[int], list[Span]]:
    """Tokens of a conversation, and the spans of all of it but the messages `left_out` and their headers.

    Args and errors are those of `turns`.
    """
    whole = _Rendered(messages, tokenizer, origin, tools)
    _check_context(whole)
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i not in left_out:
            _check_turn(whole, i, whole.text)
    kept = np.ones(len(whole.tokens), bool)
    for i in left_out:
        # A template may render nothing yet: Llama 2's writes the system message into the first user turn.
        texts = [whole.prefix(count) if count else "" for count in (i, i + 1)]
        bounds = [whole.common(*whole.encode_prefixes([text])[0]) if text else 0 for text in texts]
        if None in bounds:
            raise UserError(
                f"{origin}: message {i} has weight 0, but the chat template rewrites what comes before it or the "
                "message as the conversation goes on, so its tokens cannot be separated; leave out the weight, "
                "or set data.train_on to assistant"
            )
        kept[slice(*bounds)] = False
    return whole.tokens, _runs(kept)


def pieces(
    messages: Messages, texts: list[str], tokenizer: Tokenizer, origin: str, tools: Tools = None
) -> tuple[list[int], list[int]]:
    """Tokens of a conversation whose last turn says `texts`, one right after the other, and the index of the token that
    each of them ends with; of the last one it is the token that ends the turn.

    Raises:
      UserError: what `turns` raises; texts whose tokens cannot be told apart; a template that renders the turn in
        another way than its generation prompt begins it.
    """
    last, content = len(messages), "".join(texts)
    tokens, [(_, stop)] = turns(messages, [last - 1], tokenizer, origin, tools)
    whole = _Rendered(messages, tokenizer, origin, tools)
    before = whole.prefix(last - 1, generation_prompt=True)
    turn = whole.text[len(before) :]
    if tokens != whole.tokens or not whole.text.startswith(before) or turn.count(content) != 1:
        raise UserError(
            f"{origin}: the chat template does not write the steps of the answer as they are; take one that does, such "
            "as config.data.chat_template=chatml"
        )
    ends, found = np.cumsum([len(text) for text in texts]) + len(before) + turn.index(content), []
    for k, end in enumerate(ends[:-1].tolist()):
        token = next(i for i, (_, after) in enumerate(whole.offsets) if after >= end)
        if whole.offsets[token][1] > end or token in found:
            raise UserError(
                f"{origin}: the tokenizer merges the end of completions[{k}] with the next one; set "
                "config.objective.step_separator to one that it does not, such as two line breaks"
            )
        found.append(token)
    return tokens, [*found, stop - 1]


def encode(texts: list[str], tokenizer: Tokenizer, add_special_tokens: bool = False) -> list[list[int]]:
    """The token ids of each text; with `add_special_tokens` also those that the tokenizer adds by itself (a BOS)."""
    # verbose=False: no warning for a text longer than the tokenizer's model_max_length, it is cut by max_length later.
    return tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"] if texts else []


class _Rendered:
    """A rendered conversation.

    Attributes:
      text: as the template writes it.
      tokens: its token ids.
      offsets: for each token the characters [start, stop) of `text` that it stands for.
      template: the template, as source.
      traits: which tokens end turns, and which are borders.
    """

    def __init__(self, messages: Messages, tokenizer: Tokenizer, origin: str, tools: Tools):
        self.messages, self.tokenizer, self.origin, self.tools = messages, tokenizer, origin, tools
        self.template, self.traits = template_of(tokenizer, origin, tools), traits(tokenizer)
        self.text = render(messages, tokenizer, origin, tools)
        encoded = tokenizer(self.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        self.tokens: list[int] = encoded["input_ids"]
        self.offsets: list[Span] = encoded["offset_mapping"]
        self._borders = [i for i, token in enumerate(self.tokens) if token in self.traits.borders]
        self._border_ends = [self.offsets[i][1] for i in self._borders]

    def prefix(self, count: int, generation_prompt: bool = False) -> str:
        """The text of the first `count` messages."""
        if count == len(self.messages) and not generation_prompt:
            return self.text
        return render(self.messages[:count], self.tokenizer, self.origin, self.tools, generation_prompt)

    def encode_prefixes(self, texts: list[str]) -> list[tuple[int, list[int]]]:
        """For each text (kept, rest): its tokens are the first `kept` tokens of the whole, and then `rest`."""
        split = []  # the last border in each text, and the text from that border on
        for text in texts:
            k = bisect.bisect_right(self._border_ends, len(text)) - 1 if self.text.startswith(text) else -1
            border = self._borders[k] if k >= 0 else None
            split.append((border, text if border is None else text[self.offsets[border][0] :]))
        distinct = list(dict.fromkeys(rest for _, rest in split))  # most turns have the same header
        encoded = dict(zip(distinct, encode(distinct, self.tokenizer), strict=True))
        prefixes = []
        for text, (border, rest) in zip(texts, split, strict=True):
            tokens = encoded[rest]
            if border is None:
                prefixes.append((0, tokens))
            elif tokens and tokens[0] == self.tokens[border]:
                prefixes.append((border, tokens))
            else:  # alone, the border's text is another token: one that takes white space around it, say
                prefixes.append((0, encode([text], self.tokenizer)[0]))
        return prefixes

    def common(self, kept: int, rest: list[int]) -> int | None:
        """How many tokens of a prefix the whole begins with; None if more than end tokens and white space differs."""
        pairs = zip(rest, self.tokens[kept:], strict=False)
        shorter = min(len(rest), len(self.tokens) - kept)
        same = next((i for i, (token, other) in enumerate(pairs) if token != other), shorter)
        differing = [token for token in rest[same:] if token not in self.traits.ends]
        return None if self.tokenizer.decode(differing).strip() else kept + same


def _compared(whole: _Rendered, wanted: list[int]) -> list[_Turn]:
    """The wanted turns, found by comparing the tokens of prefixes.

    Prefixes, not single messages: templates put a BOS or a default system prompt at the start of a conversation.
    """
    origin = whole.origin
    texts = [text for i in wanted for text in (whole.prefix(i, generation_prompt=True), whole.prefix(i + 1))]
    prefixes = whole.encode_prefixes(texts)
    spans = []
    for k, i in enumerate(wanted):
        before, through = texts[2 * k : 2 * k + 2]
        kept, rest = prefixes[2 * k]
        start = kept + len(rest)
        if whole.tokens[kept:start] != rest:
            raise _no_prefix(whole.text, before, through, i, origin)
        kept, rest = prefixes[2 * k + 1]
        low = min(start, kept)
        tokens = whole.tokens[low:kept] + rest  # of the text through the turn, from token `low` on
        tokens = _without_next_prompt(tokens, start - low, whole.tokens[:start], whole)
        stops = _ends_of_turn(tokens, start - low, len(tokens), whole)
        # Of several end tokens the whole may have only the first: Phi 3 closes a conversation with one of its own.
        fits = [stop for stop in stops or [start - low] if tokens[:stop] == whole.tokens[low : low + stop]]
        if not fits:
            raise _no_prefix(whole.text, before, through, i, origin)
        if not stops:
            raise UserError(_no_end(i, origin))
        stop = low + fits[0]
        if stop == start + 1:
            raise UserError(f"{origin}: message {i} (assistant) is rendered empty; correct the chat template")
        spans.append((start, stop, through[len(before) :]))
    return spans


def _no_end(i: int, origin: str) -> str:
    return (
        f"{origin}: message {i} (assistant) is rendered without an end-of-turn token (a special token of the "
        "tokenizer), so the model would never learn to stop; end the turn with one in the chat template"
    )


def _no_prefix(full: str, before: str, through: str, i: int, origin: str) -> UserError:
    """The error of turn `i`, whose prefixes `before` and `through` have tokens that `full` does not begin with."""
    if through.startswith(before) and full.startswith(through):
        return _Merged(
            f"{origin}: message {i} (assistant) starts or ends with characters that the tokenizer merges with "
            "the template's own; strip the white space around its content, or end the template's generation prompt "
            "and assistant turn with a special token or a single line break"
        )
    return Rewritten(
        f"{origin}: the chat template rewrites what comes before or in message {i} (assistant) as the conversation "
        "goes on (or its generation prompt is not how it writes the turn), so training would not see what inference "
        "sees; set data.train_on to last, put {% generation %} markers around the template's assistant turns, or split "
        "the row by answer"
    )


def _opening(whole: _Rendered, i: int) -> str:
    """ "<think>" and what follows it at the end of turn `i`'s generation prompt; "" where that opens no thought."""
    opened = _OPENED.search(whole.prefix(i, generation_prompt=True))
    return opened[0] if opened else ""


def _thinking(whole: _Rendered, i: int) -> tuple[list[int], Span]:
    """Tokens of a conversation through turn `i`, whose generation prompt opens a thought, and the span of that turn.

    The tokens begin with those of the prompt, as in inference, where the rest is tokenized on its own.
    """
    before, tokenizer = whole.prefix(i, generation_prompt=True), whole.tokenizer
    answer = _after_thought(whole, i, before)
    prompt, joint = encode([before, before + answer], tokenizer)
    tokens = joint if joint[: len(prompt)] == prompt else prompt + encode([answer], tokenizer)[0]
    if tokenizer.decode(tokens) != tokenizer.decode(joint):
        raise _no_prefix(before + answer, before, before + answer, i, whole.origin)
    tokens = _without_next_prompt(tokens, len(prompt), prompt, whole)
    stops = _ends_of_turn(tokens, len(prompt), len(tokens), whole)
    if not stops:
        raise UserError(_no_end(i, whole.origin))
    _check_turn(whole, i, _opening(whole, i) + answer)
    return tokens, (len(prompt), stops[0])


def _after_thought(whole: _Rendered, i: int, before: str) -> str:
    """What the model is to write for turn `i` after `before`, its prompt, which ends with an opened thought.

    A turn without a thought closes it at once: "<think>\\n\\n</think>\\n\\nanswer", as Qwen's templates write it.
    """
    through, header = whole.prefix(i + 1), before.removesuffix(_opening(whole, i))
    if through.startswith(before):
        return through[len(before) :]
    if not through.startswith(header):
        raise _no_prefix(whole.text, before, through, i, whole.origin)
    rest = through[len(header) :].lstrip()
    if rest.startswith("<think>"):  # followed by other white space than in the prompt
        return rest.removeprefix("<think>").lstrip()
    message, between = whole.messages[i], "\n\n"
    thought = next((message[key] for key in REASONING if key in message), "").strip("\n") + "\n"
    if _CLOSED in message["content"]:
        inner, _, said = message["content"].partition(_CLOSED)
        thought, between = inner.partition("<think>")[2] or inner, said[: len(said) - len(said.lstrip())]
    return (thought.lstrip() or "\n") + _CLOSED + between + rest


def _marked(whole: _Rendered, wanted: list[int]) -> list[_Turn]:
    """The wanted turns, by the template's `{% generation %}` markers."""
    origin, ends, tokens, offsets = whole.origin, whole.traits.ends, whole.tokens, whole.offsets
    if any(message.get("images") for message in whole.messages):
        raise UserError(
            f"{origin}: has images, beside which the {{% generation %}} markers of a chat template are not read; take "
            "one without them"
        )
    encoded = apply_template(
        whole.messages,
        whole.tokenizer,
        origin,
        whole.tools,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    if encoded["input_ids"] != tokens:
        raise UserError(f"{origin}: the chat template renders the same conversation in two ways; correct it")
    spans = []
    for start, stop in _runs(np.asarray(encoded["assistant_masks"], bool)):
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
    assistants = [i for i, message in enumerate(whole.messages) if message["role"] == "assistant"]
    # A tokenizer that trims white space from its offsets lets a span run on into the next turn, or loses it.
    if len(spans) != len(assistants):
        raise UserError(
            f"{origin}: the chat template's {{% generation %}} markers give {len(spans)} spans for {len(assistants)} "
            "assistant turns; in the template put one block around each turn, through its end-of-turn token"
        )
    return [spans[assistants.index(i)] for i in wanted]


def _runs(mask: np.ndarray) -> list[Span]:
    """The runs of True in a bool [n]."""
    bounds = np.flatnonzero(np.diff(mask, prepend=False, append=False)).tolist()
    return list(zip(bounds[::2], bounds[1::2], strict=True))


def _without_next_prompt(tokens: list[int], start: int, before: list[int], whole: _Rendered) -> list[int]:
    """Removes a generation prompt that a template writes after a turn, as Llama 3's first one always did.

    It follows an end token, and the prompt of this turn ends with the same tokens.

    Args:
      tokens: through the turn, which begins at index `start`.
      before: all tokens of the whole up to the turn.
    """
    for stop in range(start + 1, len(tokens)):
        if tokens[stop - 1] in whole.traits.ends and before[stop - len(tokens) :] == tokens[stop:]:
            return tokens[:stop]
    return tokens


def _ends_of_turn(tokens: list[int], start: int, stop: int, whole: _Rendered) -> list[int]:
    """Where the turn tokens[start:stop] may end, descending: after each end token that only other end tokens and white
    space follow (such as the line break after ChatML's <|im_end|>, which the model need not learn)."""
    stops = []
    for i in range(stop - 1, start - 1, -1):
        if tokens[i] in whole.traits.ends:
            stops.append(i + 1)
        elif whole.tokenizer.decode([tokens[i]]).strip():
            break
    return stops


def _check_context(whole: _Rendered) -> None:
    """UserError where tools or other messages than the assistant's are missing: templates drop what they do not know.

    White space is not compared, here and in `_check_turn`, since templates trim it. A word such as SmolLM3's
    "/no_think", if the template itself contains it, is a switch that the template may remove from the message.
    """
    text = _squeezed(whole.text)
    for i, message in enumerate(whole.messages):
        content = message["content"]
        if message["role"] == "assistant" or _squeezed(content) in text:
            continue
        if message.get("images") and all(_squeezed(piece) in text for piece in content.split(MARK)):
            continue
        if _squeezed(json.dumps(content, ensure_ascii=False)[1:-1]) in text:  # some write a tool's answer as JSON
            continue
        if "".join(word for word in content.split() if word[0] != "/" or word not in whole.template) in text:
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


def _check_turn(whole: _Rendered, i: int, text: str) -> None:
    """UserError where `text` lacks a part of turn `i`, which is trained. (Earlier turns may lose their reasoning.)"""
    message = whole.messages[i]
    text = _squeezed(text)
    reasoning = next((message[key] for key in REASONING if key in message), "")
    calls = [call["function"] for call in message.get("tool_calls", ())]
    parts = {"content": [message["content"]], "tool call": [call["name"] for call in calls], "reasoning": [reasoning]}
    lost = next((name for name, values in parts.items() for value in values if _squeezed(value) not in text), None)
    if not lost and any(not _is_written(value, text) for call in calls for value in _leaves(call["arguments"])):
        lost = "arguments of a tool call"
    if lost:
        error = Rewritten if i < len(whole.messages) - 1 else UserError  # the last one may be rendered whole
        raise error(
            f"{whole.origin}: the chat template leaves out some of the {lost} of message {i} (assistant), so the model "
            "would never learn it (templates drop <think> blocks, or text beside tool calls); remove it from the row, "
            "or take a template that renders it"
        )


def _leaves(value: object) -> Iterator[str | int | float]:
    """The strings and numbers in nested dicts and lists, keys included; not true, false and null, which templates spell
    in many ways."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif value is not None and not isinstance(value, bool):
        yield value


def _is_written(value: str | int | float, squeezed: str) -> bool:
    """Whether a text without white space contains a value: plain, as JSON, or as JSON inside a JSON string."""
    forms = [str(value)]
    for ascii_only in (False, True):
        once = _quoted(value, ascii_only) if isinstance(value, str) else json.dumps(value)
        forms += [once, _quoted(once, ascii_only)]
    return any(_squeezed(form) in squeezed for form in forms)


def _quoted(text: str, ascii_only: bool) -> str:
    return json.dumps(text, ensure_ascii=ascii_only)[1:-1]


def _squeezed(text: str) -> str:
    return "".join(text.split())
