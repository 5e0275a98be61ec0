"""What a model writes to a prompt: one completion, or with an environment the turns of an episode.

What was sampled is never tokenized again: a row has the prompt, the ids of every turn as they were drawn, and between
them the ids by which the chat template goes on (`data.tokens.continuing`), of which nothing is learned.

Randomness follows from (seed, number of the episode x config.rollouts.turns + turn, token of the turn). Environments
live in the first process, which tells the others what they said.
"""

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ftjax import distributed, environments
from ftjax.assemble import Base
from ftjax.data.format.example import Document
from ftjax.data.tokens.chat import render_prompt
from ftjax.data.tokens.continuing import WRITTEN, continuation
from ftjax.data.tokens.kinds import offered
from ftjax.environments import Environment, Tools
from ftjax.errors import UserError
from ftjax.evals.scored import Question
from ftjax.sampling import stop_strings
from ftjax.sampling.engine import Completion, generate
from ftjax.sampling.sampler import Sampling
from ftjax.tree import Tree

# (variables, prompts, their numbers among all that a run completes, tokens at most of each) -> their completions
Complete = Callable[[Tree, Sequence[np.ndarray], Sequence[int], Sequence[int] | None], list[Completion]]


class Episode(NamedTuple):
    """All that follows a prompt.

    Attributes:
      tokens: int32 [n], end tokens included.
      sampled: bool [n], whether the model wrote it, and not the environment.
      logps, tempered_logps: float32 [n], how likely each sampled one was, see `sampler.Chosen`; 0 elsewhere.
      stopped: whether it came to an end: its last turn did, and the next one had room where there was to be one.
      text: of the last turn, without special tokens.
      turns: how many the model wrote.
      said: without an environment (); else the messages after the row's prompt, those of `reset` first.
      reward: the environment's, the sum over turns; 0 without one.
      calls, failures: of tools.
    """

    tokens: np.ndarray
    sampled: np.ndarray
    logps: np.ndarray
    tempered_logps: np.ndarray
    stopped: bool
    text: str
    turns: int = 1
    said: Sequence[dict] = ()
    reward: float = 0.0
    calls: int = 0
    failures: int = 0

    def document(self, prompt: np.ndarray) -> Document:
        """With its prompt; what was sampled is trained."""
        return Document(
            np.concatenate([prompt, self.tokens]), np.concatenate([np.zeros(len(prompt), bool), self.sampled])
        )


def single(completion: Completion, text: str = "") -> Episode:
    """The episode of one completion, the end token included where there is one."""
    stop = () if completion.stop_token is None else (completion.stop_token,)
    tokens = np.array([*completion.tokens, *stop], np.int32)
    return Episode(
        tokens, np.ones(len(tokens), bool), completion.logps, completion.tempered_logps, completion.stopped, text
    )


def make_complete(config: ConfigDict, base: Base, between: Callable[[], None] | None = None) -> Complete:
    """Completes prompts as config.rollouts says. between: called while it writes, to raise what ends that."""
    settings, strings = config.rollouts, config.rollouts.stop_strings
    sampling = Sampling(settings.temperature, settings.top_k, settings.top_p, config.seed, settings.min_p)
    stops_at = stop_strings.stops_at(strings, base.tokenizer, "config.rollouts.stop_strings")

    def complete(
        policy: Tree, prompts: Sequence[np.ndarray], numbers: Sequence[int], most: Sequence[int] | None = None
    ) -> list[Completion]:
        how = base.end_tokens, sampling, settings.batch_size
        most = settings.max_new_tokens if most is None else most
        return generate(base.model, policy, prompts, most, *how, stops_at=stops_at, numbers=numbers, between=between)

    return complete


# (variables, prompts, what each asks, the number of the first episode) -> (prompts, with what `reset` added; episodes).
# Prompts in groups of config.rollouts.samples are the same.
Play = Callable[
    [Tree, Sequence[np.ndarray], Callable[[int], Question], int], tuple[Sequence[np.ndarray], list[Episode]]
]


def make_play(config: ConfigDict, base: Base, between: Callable[[], None] | None = None) -> Play:
    """Plays episodes as config.rollouts says: all that are not over write their next turns together. between: as of
    `make_complete`.

    Raises:
      UserError: what `environments.factory` raises. In use: an environment that raises, or returns what is none of its
        forms, with the row and the turn; a prompt that with what `reset` adds leaves no room in data.max_length.
    """
    make, complete = environments.factory(config, base.tokenizer), make_complete(config, base, between)

    def text_of(completion: Completion) -> str:
        return base.tokenizer.decode(completion.tokens, skip_special_tokens=True)

    def play(
        policy: Tree, prompts: Sequence[np.ndarray], question: Callable[[int], Question], first: int
    ) -> tuple[Sequence[np.ndarray], list[Episode]]:
        if make is None:
            completions = complete(policy, prompts, range(first, first + len(prompts)))
            return prompts, [single(one, text_of(one)) for one in completions]
        games = [
            _Game(config, base, make if distributed.is_first() else None, question(i), prompt, first + i)
            for i, prompt in enumerate(prompts)
        ]
        _tell(games, [game.reset for game in games], _Game.begin)
        live = games
        for turn in range(config.rollouts.turns):
            numbers = [game.number * config.rollouts.turns + turn for game in live]
            completions = complete(policy, [game.ids for game in live], numbers, [game.room for game in live])
            for game, completion in zip(live, completions, strict=True):
                game.write(completion, text_of(completion))
            _tell(live, [game.step for game in live], _Game.go_on)
            if not (live := [game for game in live if not game.over]):
                break
        return [game.prompt for game in games], [game.episode() for game in games]

    return play


def _tell(games: Sequence["_Game"], asks: Sequence[Callable[[], Any]], take: Callable[["_Game", Any], None]) -> None:
    """Gives every game what its environment says, which the first process asks and tells."""
    said = json.dumps([ask() for ask in asks]) if distributed.is_first() else None
    for game, its in zip(games, json.loads(distributed.tell(said, distributed.LOADING_SECONDS)), strict=True):
        take(game, its)


class _Game:
    """An episode on its way.

    make: what makes its environment, None in a process that is told.
    """

    def __init__(
        self,
        config: ConfigDict,
        base: Base,
        make: Callable[[], Environment] | None,
        question: Question,
        prompt: np.ndarray,
        number: int,
    ):
        self._config, self._base, self._make, self._question = config, base, make, question
        self.prompt, self.number, self.over = prompt, number, False
        fields = question.prompt.fields
        asked = fields["messages"] if "messages" in fields else [{"role": "user", "content": fields["prompt"]}]
        self._before = list(asked)  # what the next turn answers, WRITTEN in place of the model's turns
        self._tools = offered(fields, environments.schemas(config), question.prompt.origin)
        self._said, self._parts, self._turns = [], [], 0
        self._stopped, self._reward, self._calls, self._failures = True, 0.0, 0, 0

    @property
    def ids(self) -> np.ndarray:
        return np.concatenate([self.prompt, *(part.tokens for part in self._parts)])

    @property
    def room(self) -> int:
        """Tokens that the next turn may have."""
        return min(self._config.rollouts.max_new_tokens, self._config.data.max_length - len(self.ids))

    @property
    def _where(self) -> str:
        return f"{self._question.prompt.origin}: turn {self._turns} of the environment"

    def reset(self) -> list[dict]:
        """What the environment says first."""
        group = self.number // self._config.rollouts.samples
        seed = int(np.random.SeedSequence((self._config.seed, group)).generate_state(1)[0])
        self._environment = self._guarded(self._make)
        example = copy.deepcopy(self._question.example)  # what one episode changes in it is not another's
        given = self._guarded(lambda: self._environment.reset(example, seed))
        return environments.messages(given, f"{self._where}: reset", self._before)

    def begin(self, said: list[dict]) -> None:
        """Puts that behind the prompt."""
        if said:
            self._before += said
            self._said += said
            self.prompt = render_prompt(self._before, self._base.tokenizer, self._tools, self._where)
        needed = len(self.prompt) + self._config.rollouts.max_new_tokens
        if needed > self._config.data.max_length:
            raise UserError(
                f"{self._where}: with what reset added the prompt has {len(self.prompt)} tokens, which leaves no room "
                f"for a turn of {self._config.rollouts.max_new_tokens} within config.data.max_length="
                f"{self._config.data.max_length}; set --config.data.max_length={needed} or more"
            )

    def write(self, completion: Completion, text: str) -> None:
        """Takes the model's turn."""
        self._parts.append(single(completion, text))
        self._said.append({"role": "assistant", "content": text})
        self._turns += 1
        self._ended_by_token = completion.stop_token is not None

    def step(self) -> dict[str, Any]:
        """What the environment says to the last turn."""
        text = self._parts[-1].text
        what = f"{self._where}, which was told {text!r}: step"
        turn = environments.checked(self._guarded(lambda: self._environment.step(text)), what)
        if not turn.done and not turn.messages:
            raise UserError(f"{what} says nothing and is not done; return messages, or done=True")
        counts = (self._environment.calls, self._environment.failures) if isinstance(self._environment, Tools) else 0
        return {"turn": turn, "counts": counts or (0, 0)}

    def go_on(self, said: dict[str, Any]) -> None:
        """Takes what the environment said: its reward, and its messages behind the turn where there is to be another.

        A turn that was cut ends the episode, and so do messages that leave no room for a token of the next.
        """
        messages, done, reward = said["turn"]
        self._reward += reward
        self._calls, self._failures = said["counts"]
        self._stopped, last = self._parts[-1].stopped, self._turns == self._config.rollouts.turns
        self.over = done or last or not self._stopped
        if self.over:
            return
        ids = continuation(self._before, messages, self._base.tokenizer, self._tools, self._where)
        ids = ids[1:] if self._ended_by_token else ids
        if len(self.ids) + len(ids) >= self._config.data.max_length:
            self.over, self._stopped = True, False
            return
        none = np.zeros(len(ids), np.float32)
        self._parts.append(Episode(np.array(ids, np.int32), np.zeros(len(ids), bool), none, none, True, ""))
        self._before += [WRITTEN, *messages]
        self._said += messages

    def episode(self) -> Episode:
        arrays = [np.concatenate([part[column] for part in self._parts]) for column in range(4)]
        counts = self._reward, self._calls, self._failures
        return Episode(*arrays, self._stopped, self._parts[-1].text, self._turns, self._said, *counts)

    def _guarded(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except UserError as error:
            raise UserError(f"{self._where}: {error}") from error
        except (Exception, SystemExit) as error:  # a person's own environment may raise anything, which is never a 0
            told = f"; it was told {self._parts[-1].text!r}" if self._parts else ""
            raise UserError(f"{self._where}: {type(error).__name__}: {error}{told}") from error
