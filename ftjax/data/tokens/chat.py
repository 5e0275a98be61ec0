"""Rows -> tokens and loss masks through the tokenizer's own chat template.

Assistant turns are trained, each with the token that ends it; `masks` says how their tokens are identified. Reasoning
and tool calls are part of their turns; tools are rendered as the template does it.
"""

import numpy as np

from ftjax.data.format import formats
from ftjax.data.format.conversation import conversation
from ftjax.data.format.example import Example, Row
from ftjax.data.tokens import masks
from ftjax.data.tokens.masks import Span, encode
from ftjax.data.tokens.rendering import Messages, Tokenizer, Tools, render
from ftjax.errors import UserError

TRAIN_ON = ("assistant", "last", "all")


class NothingTrained(UserError):
    """A good row with no trained token, because of its weights."""


def tokenize(row: Row, tokenizer: Tokenizer, vocab_size: int | None = None, train_on: str = "assistant") -> Example:
    """The example of one row, in any format.

    - text: its tokens (with a BOS only where the tokenizer adds one itself) and an eos. All are trained but the first,
      which nothing predicts.
    - chat: the rendered conversation. `train_on` says which turns are trained; a turn whose `weight` is 0 never is.
    - prompt/completion as lists of messages: one conversation; the prompt has weight 0.
    - prompt/completion as strings: with a chat template one user turn and one assistant turn, without one the plain
      text of both and an eos. The completion and its end token are trained.

    Args:
      vocab_size: rows of the model's embedding; every token id must be below it. None: not checked.
      train_on: "assistant" (every assistant turn), "last" (only the last one, so that a template may rewrite those
        before it) or "all" (every token of every message, headers too, but the first token).

    Raises:
      NothingTrained: every turn that could be trained has weight 0.
      UserError: with the row's origin; a bad row, or a template whose turns cannot be separated or that leaves
        something out.
    """
    if train_on not in TRAIN_ON:
        raise UserError(f"data.train_on = {train_on!r}: use one of {', '.join(TRAIN_ON)}")
    fields, kind = _learned(row)
    if kind == "text":
        tokens = encode([fields["text"]], tokenizer, add_special_tokens=True)[0]
        tokens = _with_eos(tokens, tokenizer, row.origin)
        return _example(tokens, [(1, len(tokens))], row.origin, tokenizer, vocab_size)
    if kind == "prompt_completion" and not tokenizer.chat_template:
        tokens, spans = _plain_completion(fields["prompt"], fields["completion"], tokenizer, row.origin)
        if train_on == "all":
            spans = [(1, len(tokens))]
        return _example(tokens, spans, row.origin, tokenizer, vocab_size)
    messages = fields.get("messages")
    if kind == "prompt_completion":
        roles = {"user": "prompt", "assistant": "completion"}
        messages = [{"role": role, "content": fields[key]} for role, key in roles.items()]
    return _chat_example(messages, fields.get("tools"), row.origin, tokenizer, vocab_size, train_on)


def tokenize_answers(
    row: Row, tokenizer: Tokenizer, vocab_size: int | None = None, train_on: str = "assistant"
) -> list[Example]:
    """The examples of one row: that of `tokenize`, or one for each trained answer where a template rewrites them.

    Templates that leave out earlier thoughts (Qwen 3), say, render an answer in one way while it is the last one, which
    is how the model is to write it, and in another way in the history of the next. So each answer is an example of its
    own, after its history as it is rendered then; nothing else in it is trained.

    Args and errors are those of `tokenize`.
    """
    try:
        return [tokenize(row, tokenizer, vocab_size, train_on)]
    except masks.Rewritten:
        fields, kind = _learned(row)
        if kind != "chat" or train_on != "assistant":
            raise
        messages, tools = fields["messages"], fields.get("tools")
        wanted = [i for i, turn in enumerate(messages) if turn["role"] == "assistant" and turn.get("weight") != 0]
        if wanted == [len(messages) - 1]:
            raise
    examples = []
    for i in wanted:
        tokens, spans = masks.turns(messages[: i + 1], [i], tokenizer, row.origin, tools)
        examples.append(_example(tokens, spans, row.origin, tokenizer, vocab_size))
    return examples


def tokenize_preference(row: Row, tokenizer: Tokenizer, vocab_size: int | None = None) -> tuple[Example, Example]:
    """The chosen and the rejected example of a preference row.

    Both begin with the tokens of the prompt; after it the assistant turns of each answer are trained. The first trained
    token is the first that the model writes.

    Raises:
      UserError: what `tokenize` raises; a row of another kind; a template that renders the prompt in two ways.
    """
    fields, kind = _fields(row)
    if kind != "preference":
        raise UserError(
            f"{row.origin}: is a row of {kind}; a preference needs `prompt`, `chosen` and `rejected`. Rewrite the row, "
            "or set objective.name to a method for such rows"
        )
    if muted := [side for side in ("chosen", "rejected") if any(turn.get("weight") == 0 for turn in fields[side])]:
        raise UserError(f"{row.origin}: {muted[0]} has a turn of weight 0; answers count whole, so leave weights out")
    tools, prompt = fields.get("tools"), fields["prompt"]
    chosen, rejected = (
        _answer(prompt, fields[side], tools, f"{row.origin}: {side}", tokenizer, vocab_size)
        for side in ("chosen", "rejected")
    )
    shared = int(np.argmax(chosen.trained))
    if shared != np.argmax(rejected.trained) or (chosen.tokens[:shared] != rejected.tokens[:shared]).any():
        raise UserError(
            f"{row.origin}: the chat template renders the prompt differently before the chosen and the rejected "
            "answer, so they cannot be compared; take a template whose turns do not depend on later ones"
        )
    return tuple(Example(side.tokens, side.trained, row.origin) for side in (chosen, rejected))


def tokenize_unpaired(row: Row, tokenizer: Tokenizer, vocab_size: int | None = None) -> Example:
    """The example of a prompt and an answer that `label` calls good or bad; the answer is trained in both cases."""
    fields, kind = _fields(row)
    if kind != "unpaired":
        its = f"label is {fields['label']!r}" if "label" in fields else f"is a row of {kind}"
        raise UserError(f"{row.origin}: {its}; this needs `prompt`, `completion` and a `label` that is true or false")
    return _answer(fields["prompt"], fields["completion"], fields.get("tools"), row.origin, tokenizer, vocab_size)


def tokenize_stepwise(
    row: Row, tokenizer: Tokenizer, vocab_size: int | None = None, separator: str = "\n"
) -> tuple[Example, np.ndarray]:
    """The example of a prompt and an answer in steps, and float32 [n]: +1 at the token that ends a right step, -1 at
    that of a wrong one, else 0. These tokens are trained.

    The steps are one answer with a separator between them. A step ends with the separator, the last one with the token
    that ends the turn: what the model writes when it is done with the step.
    """
    fields, kind = _fields(row)
    if kind != "stepwise":
        raise UserError(f"{row.origin}: is a row of {kind}; this needs `prompt`, `completions` and a `labels` for each")
    steps = fields["completions"]
    steps = [steps[0].lstrip(), *steps[1:]]  # templates trim answers
    texts = [step + separator for step in steps[:-1]] + [steps[-1].rstrip()]
    messages = [*fields["prompt"], {"role": "assistant", "content": "".join(texts)}]
    tokens, ends = masks.pieces(messages, texts, tokenizer, row.origin, fields.get("tools"))
    example = _example(tokens, [(end, end + 1) for end in ends], row.origin, tokenizer, vocab_size)
    labels = np.zeros(len(tokens), np.float32)
    labels[ends] = [1 if right else -1 for right in fields["labels"]]
    return example, labels


def tokenize_classified(row: Row, tokenizer: Tokenizer, vocab_size: int | None = None) -> Example:
    """The example of a text or a conversation that has a class: the tokens of `tokenize`, all trained but the first."""
    fields, kind = _fields(row)
    if kind != "classified":
        raise UserError(
            f"{row.origin}: has no class; this needs a `label`, a name of config.objective.classes or an index, beside "
            "text, messages, or prompt and completion (there true and false, as 0 and 1, need the format 'classified')"
        )
    messages = fields.get("messages")
    if "prompt" in fields:
        prompt, completion = fields["prompt"], fields["completion"]
        if isinstance(prompt, list):
            messages = prompt + completion
        elif tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        else:
            tokens, _ = _plain_completion(prompt, completion, tokenizer, row.origin)
    if "text" in fields:
        tokens = encode([fields["text"]], tokenizer, add_special_tokens=True)[0]
        tokens = _with_eos(tokens, tokenizer, row.origin)
    if messages is not None:
        tokens, _ = masks.without(messages, [], tokenizer, row.origin, fields.get("tools"))
    return _example(tokens, [(1, len(tokens))], row.origin, tokenizer, vocab_size)


def render_prompt(
    messages: Messages | str, tokenizer: Tokenizer, tools: Tools = None, origin: str = "the prompt"
) -> np.ndarray:
    """int32 [n]: the tokens that a model is given to answer, exactly those that precede the answer in training.

    Args:
      messages: a conversation, rendered with the generation prompt; or the prompt of a prompt/completion row, a string.
      origin: where it is, for messages.
    """
    if isinstance(messages, str) and not tokenizer.chat_template:
        tokens = encode([messages], tokenizer, add_special_tokens=True)[0]
    else:
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        turns = conversation(turns, origin, needs_assistant=False)
        tokens = encode([render(turns, tokenizer, origin, tools, generation_prompt=True)], tokenizer)[0]
    return checked(tokens, origin, tokenizer, None)


def _fields(row: Row) -> tuple[dict, str]:
    """The checked fields of a row, and which of the records they are (`formats.kind_of`)."""
    fields = formats.check_row(row.fields, row.origin).fields
    return fields, formats.kind_of(fields)


def _learned(row: Row) -> tuple[dict, str]:
    """The same of a row whose answers are to be learned; a class of the whole is left out.

    Raises:
      UserError: an answer of it may be a bad one.
    """
    fields, kind = _fields(row)
    if kind == "classified" and "completion" not in fields:
        fields = {name: value for name, value in fields.items() if name != "label"}
        return formats.check_row(fields, row.origin).fields, formats.kind_of(fields)
    whats = {"preference": "a preference pair", "stepwise": "an answer in steps with labels"}
    if kind in ("unpaired", "classified", *whats):
        raise UserError(
            f"{row.origin}: is {whats.get(kind, 'an answer with a label')}, which this objective does not train on; "
            "set objective.name to one that does, or `format` to what else the row holds"
        )
    return fields, kind


def _chat_example(
    messages: Messages, tools: Tools, origin: str, tokenizer: Tokenizer, vocab_size: int | None, train_on: str
) -> Example:
    ignored = [i for i, message in enumerate(messages) if message.get("weight") == 0]
    if train_on == "all":
        tokens, spans = masks.without(messages, ignored, tokenizer, origin, tools)
    else:
        wanted = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = [i for i in (wanted[-1:] if train_on == "last" else wanted) if i not in ignored]
        if not wanted:
            which = "the last assistant turn" if train_on == "last" else "every assistant turn"
            what = f"no trainable token: {which} has weight 0; give one weight 1 or remove the row"
            raise NothingTrained(f"{origin}: {what}")
        tokens, spans = masks.turns(messages, wanted, tokenizer, origin, tools)
    return _example(tokens, spans, origin, tokenizer, vocab_size)


def _answer(
    prompt: Messages, answer: Messages, tools: Tools, origin: str, tokenizer: Tokenizer, vocab_size: int | None
) -> Example:
    messages = [{**message, "weight": 0} for message in prompt] + answer
    return _chat_example(messages, tools, origin, tokenizer, vocab_size, "assistant")


def _example(
    tokens: list[int], spans: list[Span], origin: str, tokenizer: Tokenizer, vocab_size: int | None
) -> Example:
    array = checked(tokens, origin, tokenizer, vocab_size)
    trained = np.zeros(len(array), bool)
    for start, stop in spans:
        trained[start:stop] = True
    trained[:1] = False  # nothing predicts it
    if not trained.any():
        raise NothingTrained(f"{origin}: no trainable token in {len(tokens)}; write an answer or remove the row")
    return Example(array, trained, origin)


def _plain_completion(prompt: str, completion: str, tokenizer: Tokenizer, origin: str) -> tuple[list[int], list[Span]]:
    before, joint = encode([prompt, prompt + completion], tokenizer, add_special_tokens=True)
    if joint[: len(before)] == before:
        tokens = joint
    else:
        # A token of the joint text spans the boundary. In inference the prompt is tokenized alone, so here too.
        tokens = before + encode([completion], tokenizer)[0]
        if tokenizer.decode(tokens) != tokenizer.decode(joint):
            raise UserError(
                f"{origin}: the tokenizer cannot split the text between prompt and completion; move the "
                "space between them to the start of the completion"
            )
    tokens = _with_eos(tokens, tokenizer, origin)
    return tokens, [(len(before), len(tokens))]


def _with_eos(tokens: list[int], tokenizer: Tokenizer, origin: str) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise UserError(f"{origin}: the tokenizer has no eos_token; set it in tokenizer_config.json")
    return tokens if tokens and tokens[-1] == tokenizer.eos_token_id else [*tokens, tokenizer.eos_token_id]


def checked(tokens: list[int], origin: str, tokenizer: Tokenizer, vocab_size: int | None) -> np.ndarray:
    """int32 [n] of the ids; UserError for a doubled BOS, or a token that the model does not have."""
    bos = tokenizer.bos_token_id
    if bos is not None and tokens[:2] == [bos, bos]:
        raise UserError(
            f"{origin}: starts with two BOS tokens ({tokenizer.bos_token!r}); remove it from the text or "
            "the chat template, since it is added once already"
        )
    array = np.asarray(tokens, np.int32)
    if vocab_size is not None and array.size and array.max() >= vocab_size:
        name = tokenizer.convert_ids_to_tokens(int(array.max()))
        raise UserError(
            f"{origin}: token {array.max()} ({name!r}) is beyond the {vocab_size} rows of the model's embedding; take "
            "it out of the text, take the tokenizer that belongs to the model, or let config.model.resize_vocab=true "
            "grow the embedding for it"
        )
    return array
