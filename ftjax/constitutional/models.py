"""Who writes, and who judges: a model here, or one behind an OpenAI-compatible endpoint."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ftjax.assemble import Base
from ftjax.constitutional.requests import NEXT_TURN, Messages, transcript
from ftjax.data.tokens.chat import render_prompt
from ftjax.errors import UserError
from ftjax.evals.chat_endpoint import Endpoint
from ftjax.evals.likelihood import Item, log_likelihoods
from ftjax.sampling.engine import generate
from ftjax.sampling.sampler import Sampling
from ftjax.tree import Tree

LETTERS = ("(A)", "(B)")


class Text(NamedTuple):
    """What a model wrote. If it has not `ended` by itself, it was cut."""

    text: str
    ended: bool


class Asked(NamedTuple):
    """A model that is asked.

    Attributes:
      name: which.
      write: (conversations, max_new_tokens, sampling, first) -> a Text for each; its randomness follows from the seed
        of the sampling and `first` + its index. That of an endpoint is its own.
      choose: conversations -> float64 [n], the probability of (A) among the answers (A) and (B).
    """

    name: str
    write: Callable[[Sequence[Messages], int, Sampling, int], list[Text]]
    choose: Callable[[Sequence[Messages]], np.ndarray]


def local(base: Base, variables: Tree, batch_size: int) -> Asked:
    """A model here. variables: on one device or sharded over a mesh. batch_size: conversations that it answers at once.

    One without a chat template is given a transcript (`requests.transcript`), and its answer ends with its turn.
    """
    tokenizer, model = base.tokenizer, base.model
    mesh = jax.tree.leaves(variables)[0].sharding.mesh
    letters = [tokenizer.encode(text, add_special_tokens=False) for text in _letters(tokenizer.chat_template)]

    def tokens(messages: Messages, room: int) -> np.ndarray:
        given = messages if tokenizer.chat_template else transcript(messages)
        ids = render_prompt(given, tokenizer)
        if len(ids) + room > model.spec.max_position_embeddings:
            raise UserError(
                f"a request has {len(ids)} tokens and its answer may have {room}, which exceeds the "
                f"{model.spec.max_position_embeddings} positions of {base.source}; lower --shots or --max_new_tokens, "
                f"or shorten the prompt. It ends with:\n{messages[-1]['content'][:500]}"
            )
        return ids

    def write(conversations: Sequence[Messages], max_new_tokens: int, sampling: Sampling, first: int) -> list[Text]:
        ids = [tokens(messages, max_new_tokens) for messages in conversations]
        with jax.set_mesh(mesh):
            found = generate(model, variables, ids, max_new_tokens, base.end_tokens, sampling, batch_size, first=first)
        texts = [Text(tokenizer.decode(one.tokens, skip_special_tokens=True), one.stopped) for one in found]
        return texts if tokenizer.chat_template else [_within_turn(text) for text in texts]

    def choose(conversations: Sequence[Messages]) -> np.ndarray:
        room = max(map(len, letters))
        items = [Item(ids, letter) for ids in (tokens(one, room) for one in conversations) for letter in letters]
        with jax.set_mesh(mesh):
            totals = [found.total for found in log_likelihoods(model, variables, items)]
        return normalized(totals[::2], totals[1::2])

    return Asked(base.source, write, choose)


def endpoint(url: str, model: str, **settings: Any) -> Asked:
    """A model behind an endpoint. settings: further ones of `Endpoint`.

    Raises:
      UserError: from `choose`, the endpoint gives no log-probabilities, or neither letter is among the likely tokens.
    """

    def write(conversations: Sequence[Messages], max_new_tokens: int, sampling: Sampling, first: int) -> list[Text]:
        options = {"temperature": sampling.temperature, "max_tokens": max_new_tokens}
        choices = Endpoint(url, model, **{"options": options} | settings).choices(conversations)
        return [Text(choice["message"]["content"], choice.get("finish_reason") != "length") for choice in choices]

    def choose(conversations: Sequence[Messages]) -> np.ndarray:
        options = {"temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 20}
        choices = Endpoint(url, model, **{"options": options} | settings).choices(conversations)
        asked = [messages[-1]["content"] for messages in conversations]
        return np.array([_of_choice(*both, url) for both in zip(choices, asked, strict=True)], np.float64)

    return Asked(model, write, choose)


def normalized(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    """float64 [n]: e^a / (e^a + e^b), of log-probabilities."""
    return np.exp(-np.logaddexp(0.0, np.asarray(b, np.float64) - np.asarray(a, np.float64)))


def _letters(template: str | None) -> list[str]:
    """The answers as they go on from what comes before: a transcript ends with a colon, a template with a new turn."""
    return list(LETTERS) if template else [f" {letter}" for letter in LETTERS]


def _within_turn(text: Text) -> Text:
    """The first turn of what goes on from a transcript."""
    turn, next_turn, _ = text.text.partition(NEXT_TURN)
    return Text(turn.strip(), text.ended or bool(next_turn))


def _of_choice(choice: dict[str, Any], question: str, url: str) -> float:
    """p(A) of (A) and (B) at the first token of a reply whose alternatives have one of them.

    A letter that is not among the likeliest tokens, of which endpoints tell some twenty, counts as impossible.
    """
    places = (choice.get("logprobs") or {}).get("content")
    if not isinstance(places, list) or not places:
        raise UserError(f"{url}: gives no log-probabilities (`logprobs`); name an endpoint that does, or a model here")
    for place in places:
        sums = dict.fromkeys("AB", 0.0)
        try:
            for found in place["top_logprobs"]:
                letter = found["token"].strip(" ()\n")
                if letter in sums:
                    sums[letter] += math.exp(found["logprob"])
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{url}: its logprobs are not those of OpenAI's API: {place!r:.500}") from error
        if total := sum(sums.values()):
            return sums["A"] / total
    reply = choice["message"]["content"]
    raise UserError(f"{url}: neither A nor B is likely in the reply {reply!r}; it was asked:\n{question}")
