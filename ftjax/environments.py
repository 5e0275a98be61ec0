"""What answers a model in an episode of several turns: environments of one's own, and functions that it may call.

An environment is made for each episode, without arguments, by what config.rollouts.environment names:

    class Guess:
        def reset(self, example, seed): ...  # -> messages that follow the row's prompt, or None
        def step(self, completion): ...      # -> Turn(messages, done, reward)

`example` is what a reward function gets: the row's fields, and the conversation as "messages". `seed` is the same for
all episodes of a prompt in a round, so that these are compared in the same game, and another in each round. `step` is
told the text of every turn, the last one too, of which its messages go nowhere.
"""

import functools
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ml_collections import ConfigDict

from ftjax import named, strict_json
from ftjax.data.format.conversation import conversation
from ftjax.data.tokens.continuing import WRITTEN, continuation
from ftjax.data.tokens.masks import encode
from ftjax.data.tokens.rendering import Tokenizer, render
from ftjax.errors import UserError

ENVIRONMENT = "environment"  # in config.objective.rewards: the sum that an environment gives


class Turn(NamedTuple):
    """What an environment says to a turn of the model.

    Attributes:
      messages: [{"role", "content"}, ...], of the user or of tools, which the model is to answer.
      done: whether the episode ends here.
      reward: those of all turns are summed.
    """

    messages: Sequence[dict] = ()
    done: bool = False
    reward: float = 0.0


class Environment(Protocol):
    """See the module."""

    def reset(self, example: dict, seed: int) -> Sequence[dict] | None: ...

    def step(self, completion: str) -> Turn: ...


class Tools:
    """The environment in which a model's calls of functions are answered; what has no call goes to another one.

    functions: by name. parse: a completion -> its calls, of FORMS. inner: what a turn without a call is told, None: it
    ends the episode.

    A call that fails, or cannot be read, is answered by its error, as {"error": ...}.
    """

    def __init__(self, functions: Mapping[str, Callable], parse: "Parse", inner: Environment | None = None):
        self._functions, self._parse, self._inner = functions, parse, inner
        self.calls = self.failures = 0

    def reset(self, example: dict, seed: int) -> Sequence[dict] | None:
        return None if self._inner is None else self._inner.reset(example, seed)

    def step(self, completion: str) -> Turn:
        calls = self._parse(completion)
        if calls:
            return Turn([self._answer(call) for call in calls])
        return Turn(done=True) if self._inner is None else self._inner.step(completion)

    def _answer(self, call: "Call | str") -> dict:
        self.calls += 1
        try:
            if isinstance(call, str):
                raise ValueError(call)
            if call.name not in self._functions:
                raise ValueError(f"there is no tool {call.name!r}; there are {', '.join(self._functions)}")
            result = self._functions[call.name](**call.arguments)
            content = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
            content.encode()  # half of a surrogate pair, which no tokenizer takes
        except (Exception, SystemExit) as error:  # a person's own function may raise anything; the model is to see it
            self.failures += 1
            content = json.dumps({"error": str(error) or type(error).__name__})
        # A name that there is not was sampled, and may be text that no message can have.
        name = call.name if isinstance(call, Call) and call.name in self._functions else "unknown"
        return {"role": "tool", "name": name, "content": content}


class Call(NamedTuple):
    name: str
    arguments: dict[str, Any]


# A completion -> the calls in it; in place of one that cannot be read what is wrong with it.
Parse = Callable[[str], list[Call | str]]

_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)


def tagged(completion: str) -> list[Call | str]:
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, once or more often: of Hermes and Qwen."""
    return [_call(text, "arguments") for text in _TAGGED.findall(completion)]


def bare(completion: str) -> list[Call | str]:
    """{"name": ..., "parameters": {...}} and nothing else: of Llama 3."""
    text = completion.strip()
    is_one = text.startswith("{") and '"name"' in text and '"parameters"' in text
    return [_call(text, "parameters")] if is_one else []


FORMS: tuple[Parse, ...] = (tagged, bare)


def _call(text: str, key: str) -> Call | str:
    try:
        value = strict_json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"the call is not JSON: {error}"
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return 'the call is no object with a "name"'
    if not isinstance(arguments := value.get(key, {}), dict):
        return f"{key} of the call are no object"
    return Call(value["name"], arguments)


@functools.cache
def _functions(names: tuple[str, ...]) -> dict[str, Callable]:
    """{name: function} of what config.rollouts.tools names."""
    found = {}
    for name in names:
        function = named.find(name, "config.rollouts.tools:")
        if not inspect.isfunction(function):
            raise UserError(f"config.rollouts.tools: {name!r} is no function; name one that is")
        if function.__name__ in found:
            raise UserError(f"config.rollouts.tools: two functions have the name {function.__name__!r}; rename one")
        found[function.__name__] = function
    return found


def schemas(config: ConfigDict) -> str:
    """The JSON schemas of config.rollouts.tools, a list, made of signatures and docstrings; "" where there are none.

    Raises:
      UserError: there is no such function, or its arguments have no types or descriptions.
    """
    if not config.rollouts.tools:
        return ""
    from transformers.utils import DocstringParsingException, TypeHintParsingException, get_json_schema

    out = []
    for name, function in zip(config.rollouts.tools, _functions(tuple(config.rollouts.tools)).values(), strict=True):
        try:
            out.append(get_json_schema(function))
        except (DocstringParsingException, TypeHintParsingException) as error:
            raise UserError(
                f"config.rollouts.tools: {name!r}: {error}; give every argument a type, and a line of its own below "
                "'Args:' in the docstring"
            ) from error
    return json.dumps(out)


def factory(config: ConfigDict, tokenizer: Tokenizer) -> Callable[[], Environment] | None:
    """What makes the environment of an episode; None for a config without one, whose episodes have one turn.

    Raises:
      UserError: what it names is not there or no environment; a template in which a conversation cannot go on, or whose
        form of calls is not known here.
    """
    name, tools = config.rollouts.environment, tuple(config.rollouts.tools)
    if not name and not tools:
        return None
    asked, where = [{"role": "user", "content": "Name an animal."}], "config.rollouts.turns"
    offered = json.loads(schemas(config)) if tools else None
    make = None
    if name:
        make = named.find(name, "config.rollouts.environment:")
        if lacking := [one for one in ("reset", "step") if inspect.isclass(make) and not hasattr(make, one)]:
            raise UserError(f"config.rollouts.environment: {name!r} has no method {lacking[0]!r}")
        if config.rollouts.turns > 1:
            continuation(asked, [{"role": "user", "content": "Another one."}], tokenizer, offered, where)
    if not tools:
        return make
    functions = _functions(tools)
    answer = {"role": "tool", "name": next(iter(functions)), "content": "giraffe"}
    continuation(asked, [answer], tokenizer, offered, where)
    parse = form_of(tokenizer, offered, "config.rollouts.tools")
    return lambda: Tools(functions, parse, make() if make else None)


def form_of(tokenizer: Tokenizer, offered: list[dict], where: str) -> Parse:
    """That of FORMS by which the template writes calls, seen from one: where special tokens are part of it, there is
    none, since a completion's text is without them.

    Raises:
      UserError: naming `where`; it is another form, or none.
    """
    call, name = {"stripe": "a", "count": 3}, offered[0]["function"]["name"]
    asked = [{"role": "user", "content": "Name an animal."}]
    calls = [{"type": "function", "function": {"name": name, "arguments": call}}]
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    before = render(asked, tokenizer, where, offered, generation_prompt=True)
    text = render([*asked, turn], tokenizer, where, offered)
    said = tokenizer.decode(encode([text.removeprefix(before)], tokenizer)[0], skip_special_tokens=True)
    for form in FORMS:
        if text.startswith(before) and form(said) == [Call(name, call)]:
            return form
    raise UserError(
        f"{where}: the chat template writes calls in a form that is not read here (read are "
        '<tool_call>{"name", "arguments"}</tool_call> and {"name", "parameters"}); take a model, or '
        "config.data.chat_template, with one of these"
    )


def checked(given: object, what: str) -> Turn:
    """The Turn that `step` returned, also as a plain tuple; UserError with `what` for anything else, NaN included."""
    if not isinstance(given, tuple) or not 2 <= len(given) <= 3:
        raise UserError(f"{what} returned {given!r}; return Turn(messages, done, reward), or (messages, done)")
    turn = Turn(*given)
    if not isinstance(turn.done, bool):
        raise UserError(f"{what}: done is {turn.done!r}; it must be True or False")
    try:
        reward = float(turn.reward)
    except (TypeError, ValueError, OverflowError):
        reward = math.nan
    if not math.isfinite(reward):
        raise UserError(f"{what}: the reward is {turn.reward!r}; it must be a finite number")
    return Turn(messages(turn.messages, what, [WRITTEN]), turn.done, reward)


def messages(given: object, what: str, before: Sequence[dict] = ()) -> list[dict]:
    """Messages of an environment, as `conversation` has them; UserError with `what` for others, and for turns of the
    model's own."""
    given = [] if given is None else given
    if not isinstance(given, list | tuple):
        raise UserError(f"{what}: messages are {given!r}; return a list of {{role, content}}")
    if not given:
        return []
    said = conversation([*before, *given], what, needs_assistant=False)[len(before) :]
    if any(message["role"] == "assistant" for message in said):
        raise UserError(f"{what}: has a message of the assistant, which is the model's own part; return other roles")
    return said
