"""Graders as OpenAI's API has them: a description in JSON that says what an answer is worth.

    {"type": "string_check", "name": "right", "input": "{{ sample.output_text }}", "reference": "{{ item.answer }}",
     "operation": "eq"}

`item` is the row with all its fields, `sample` what the model wrote: `output_text`, and where it is JSON `output_json`.
In a config grader:FILE names such a description as a score, for rewards and for evaluations.
"""

import ast
import contextlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ftjax import strict_json
from ftjax.errors import TransientError, UserError, did_you_mean
from ftjax.evals import formula, placeholders, sandbox, similarity
from ftjax.evals.chat_endpoint import Endpoint

_MOST_CODE = 256 * 1024  # characters of a python grader
_SECONDS = 10
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_ROLES = ("system", "developer", "user", "assistant")
Grader = Mapping[str, Any]


class Grade(NamedTuple):
    """What an answer is worth.

    Attributes:
      reward: 0 where an error of the answer's own kept it from being graded.
      parts: rewards of the graders of a multi grader, by their keys; of any other its own, by its name.
      errors: {"sample_parse_error": "why", ...}, in OpenAI's words.
    """

    reward: float
    parts: dict[str, float]
    errors: dict[str, str]


class Judges(NamedTuple):
    """Who answers graders of the type score_model: an endpoint with several models, as of `Endpoint`.

    url: "" where there is none. key: the environment variable with its key, "" for none.
    """

    url: str = ""
    key: str = ""


NOBODY = Judges()


def check(grader: object, judges: Judges = NOBODY) -> Grader:
    """The grader; UserError that names what is wrong with it. judges: who would be asked."""
    if not isinstance(grader, Mapping):
        raise UserError(f"a grader is an object with a type, and this is a {type(grader).__name__}")
    kind = grader.get("type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UserError(f"there is no type of graders {kind!r}{did_you_mean(str(kind), _KINDS)}")
    needed, optional, own = _KINDS[kind]
    for key in ("name", *needed):
        if key not in grader:
            raise UserError(f"a grader of the type {kind} needs {key!r}")
    if "image_tag" in grader:
        raise UserError("image_tag is not served: python graders have Python's standard library; leave it out")
    if unknown := sorted(map(str, grader.keys() - {"type", "name", *needed, *optional})):
        raise UserError(f"a grader of the type {kind} has no {unknown[0]!r}")
    for key in ("name", *needed):
        if key not in ("graders", "input") and not isinstance(grader[key], str):
            raise UserError(f"{key!r} of a grader must be text")
    own(grader, judges)
    return grader


def grade(grader: Grader, text: str, item: Mapping[str, Any], judges: Judges = NOBODY) -> Grade:
    """What an answer is worth by a grader that was checked.

    Raises:
      UserError: the row lacks a field that the grader names, a formula has no value; TransientError: a judge does not
        answer.
    """
    sample: dict[str, Any] = {"output_text": text, "choices": [{"message": {"role": "assistant", "content": text}}]}
    with contextlib.suppress(ValueError, RecursionError):
        sample["output_json"] = strict_json.loads(text)
    values = {"sample": sample, "item": item}
    if grader["type"] != "multi":
        reward, errors = _graded(grader, values, judges)
        return Grade(reward, {grader["name"]: reward}, errors)
    found = {name: _graded(one, values, judges) for name, one in grader["graders"].items()}
    parts = {name: reward for name, (reward, _) in found.items()}
    errors = {code: why for _, its in found.values() for code, why in its.items()}
    return Grade(formula.value(grader["calculate_output"], parts), parts, errors)


def fields(grader: Grader) -> list[str]:
    """The names of values of the row that it needs, such as item.answer."""
    if grader["type"] == "multi":
        return [name for one in grader["graders"].values() for name in fields(one)]
    return [name for text in _templates(grader) for name in placeholders.names(text) if name.startswith("item")]


def runs_code(grader: Grader) -> bool:
    return grader["type"] == "python" or any(map(runs_code, grader.get("graders", {}).values()))


def read(path: str, where: str) -> tuple[Grader, Judges]:
    """The grader of a file, alone or with who answers: {"grader": {...}, "url": ..., "key": ...}."""
    try:
        given = strict_json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: grader {path}: {error}") from error
    judges = Judges()
    if isinstance(given, dict) and "grader" in given:
        judges = Judges(given.get("url", ""), given.get("key", ""))
        given = given["grader"]
    try:
        return check(given, judges), judges
    except UserError as error:
        raise UserError(f"{where}: grader {path}: {error}") from error


def as_text(grader: Grader, judges: Judges) -> str:
    """A file for `read`."""
    return json.dumps({"grader": grader, "url": judges.url, "key": judges.key}, ensure_ascii=False, indent=2) + "\n"


def _graded(grader: Grader, values: Mapping[str, Any], judges: Judges) -> tuple[float, dict[str, str]]:
    try:
        reward = _GRADE[grader["type"]](grader, values, judges)
    except placeholders.Absent as absent:
        if absent.name.startswith("item"):
            raise UserError(
                f"grader {grader['name']!r}: {absent}: the row has the fields {sorted(values['item'])}"
            ) from absent
        return 0.0, {"sample_parse_error": str(absent)}
    except _Failed as failed:
        return 0.0, {failed.code: str(failed)}
    return float(reward), {}


class _Failed(Exception):
    """An answer is not graded, for its own sake. code: in OpenAI's words."""

    def __init__(self, code: str, why: str):
        super().__init__(why)
        self.code = code


def _check_texts(grader: Grader, judges: Judges) -> None:
    for text in _templates(grader):
        for name in placeholders.names(text):
            if name.partition(".")[0].partition("[")[0] not in ("item", "sample"):
                raise UserError(f"{{{{ {name} }}}}: values are those of `item` and `sample`")


def _check_string(grader: Grader, judges: Judges) -> None:
    if not isinstance(grader["input"], str):
        raise UserError("'input' of a grader must be text")
    if grader["operation"] not in _OPERATIONS:
        raise UserError(f"operation is {grader['operation']!r}{did_you_mean(grader['operation'], _OPERATIONS)}")
    _check_texts(grader, judges)


def _check_similarity(grader: Grader, judges: Judges) -> None:
    if not isinstance(grader["input"], str):
        raise UserError("'input' of a grader must be text")
    similarity.check(grader["evaluation_metric"])
    _check_texts(grader, judges)


def _check_python(grader: Grader, judges: Judges) -> None:
    if len(grader["source"]) > _MOST_CODE:
        raise UserError(f"the source of a python grader has {_MOST_CODE} characters at most")
    try:
        tree = ast.parse(grader["source"])
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"the source of grader {grader['name']!r} is not Python: {error}") from error
    if "grade" not in {getattr(node, "name", None) for node in tree.body}:
        raise UserError(f"the source of grader {grader['name']!r} has no function grade(sample, item)")


def _check_model(grader: Grader, judges: Judges) -> None:
    if not judges.url:
        raise UserError("graders of the type score_model are not served here: no endpoint is set for them")
    turns = grader["input"]
    if not isinstance(turns, list) or not turns:
        raise UserError("'input' of a score_model grader is a list of messages")
    for turn in turns:
        if not isinstance(turn, Mapping) or turn.get("role") not in _ROLES or not isinstance(_content(turn), str):
            raise UserError(f"'input' has {turn!r}; a message has a role ({', '.join(_ROLES)}) and text as its content")
    low, high = _range(grader)
    if not low < high:
        raise UserError(f"range is {grader['range']!r}; it must be two numbers, the smaller first")
    given = grader.get("sampling_params") or {}
    if not isinstance(given, Mapping):
        raise UserError(f"sampling_params is an object, not {given!r}")
    if unknown := sorted(given.keys() - _SAMPLING.keys()):
        raise UserError(f"sampling_params has no {unknown[0]!r}{did_you_mean(unknown[0], _SAMPLING)}")
    _check_texts(grader, judges)


def _check_multi(grader: Grader, judges: Judges) -> None:
    graders = grader["graders"]
    if not isinstance(graders, Mapping) or not graders:
        raise UserError("'graders' of a multi grader is an object of graders, by the names that the formula has")
    for name, one in graders.items():
        if isinstance(one, Mapping) and one.get("type") == "multi":
            raise UserError(f"graders.{name}: a multi grader cannot hold another")
        try:
            check(one, judges)
        except UserError as error:
            raise UserError(f"graders.{name}: {error}") from error
    if absent := sorted(formula.names(grader["calculate_output"]) - graders.keys()):
        raise UserError(f"calculate_output names {absent[0]!r}, and there is no such grader")


def _templates(grader: Grader) -> list[str]:
    if grader["type"] == "score_model":
        return [_content(turn) for turn in grader["input"]]
    return [grader[key] for key in ("input", "reference") if key in grader]


def _content(turn: Mapping[str, Any]) -> Any:
    """The text of a message, which may be given as one part, or several."""
    content = turn.get("content")
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


def _by_string(grader: Grader, values: Mapping[str, Any], judges: Judges) -> float:
    texts = (placeholders.fill(grader[key], values) for key in ("input", "reference"))
    return float(_OPERATIONS[grader["operation"]](*texts))


def _by_similarity(grader: Grader, values: Mapping[str, Any], judges: Judges) -> float:
    texts = (placeholders.fill(grader[key], values) for key in ("input", "reference"))
    return similarity.METRICS[grader["evaluation_metric"]](*texts)


def _by_python(grader: Grader, values: Mapping[str, Any], judges: Judges) -> float:
    value, trouble = sandbox.call(grader["source"], "grade", [values["sample"], values["item"]], _SECONDS)
    if trouble or not math.isfinite(value):
        raise _Failed("python_grader_runtime_error", trouble or f"grade returned {value}")
    return value


def _by_model(grader: Grader, values: Mapping[str, Any], judges: Judges) -> float:
    low, high = _range(grader)
    turns = [{"role": turn["role"], "content": placeholders.fill(_content(turn), values)} for turn in grader["input"]]
    form = f"Reply with one number from {low:g} to {high:g}, the score, and nothing else."
    given = grader.get("sampling_params") or {}
    options = {theirs: given[ours] for ours, theirs in _SAMPLING.items() if given.get(ours) is not None}
    ask = Endpoint(judges.url, grader["model"], judges.key, {"temperature": 0, **options}, tries=3)
    try:
        (reply,) = ask([[*turns, {"role": "user", "content": form}]])
    except TransientError:
        raise
    except UserError as error:
        raise _Failed("model_grader_server_error", str(error)) from error
    numbers = _NUMBER.findall(reply)
    if not numbers:
        raise _Failed("model_grader_parse_error", f"the model's reply has no number: {reply[:200]!r}")
    return min(max(float(numbers[-1]), low), high)


def _range(grader: Grader) -> tuple[float, float]:
    given = grader.get("range") or (0, 1)
    numbers = isinstance(given, list | tuple) and all(type(one) in (int, float) and abs(one) < 1e9 for one in given)
    return (float(given[0]), float(given[1])) if numbers and len(given) == 2 else (0.0, 0.0)


_SAMPLING = {
    **{"max_completions_tokens": "max_completion_tokens", "max_completion_tokens": "max_completion_tokens"},
    **{"seed": "seed", "temperature": "temperature", "top_p": "top_p"},
}
_OPERATIONS: dict[str, Callable[[str, str], bool]] = {
    "eq": lambda text, reference: text == reference,
    "ne": lambda text, reference: text != reference,
    "like": lambda text, reference: reference in text,
    "ilike": lambda text, reference: reference.lower() in text.lower(),
}
# type -> the keys that it needs, those that it may have, and its own check
_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[Grader, Judges], None]]] = {
    "string_check": (("input", "reference", "operation"), (), _check_string),
    "text_similarity": (("input", "reference", "evaluation_metric"), (), _check_similarity),
    "python": (("source",), (), _check_python),
    "score_model": (("input", "model"), ("range", "sampling_params"), _check_model),
    "multi": (("graders", "calculate_output"), (), _check_multi),
}
_GRADE: dict[str, Callable[[Grader, Mapping[str, Any], Judges], float]] = {
    "string_check": _by_string,
    "text_similarity": _by_similarity,
    "python": _by_python,
    "score_model": _by_model,
}
