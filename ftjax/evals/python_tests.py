"""Python functions that a model writes, scored by the tests of a row: 1.0 where all of them pass.

The tests of a row are `tests`, code or a list of lines; `test` and `entry_point` as in HumanEval (Chen et al. 2021); or
`test_list`, with `test_setup_code` and `test_imports` where there are any, as in MBPP (Austin et al. 2021).
"""

import ast
import re

from ftjax.errors import UserError
from ftjax.evals import sandbox

_FENCE = re.compile(r"^[ \t]*```[ \t]*\w*[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def passes(completion: str, example: dict) -> float:
    """1.0 where the completion's code passes the row's tests in the sandbox; see `sandbox` for what it may do."""
    return float(not sandbox.run(program(completion, example)))


def valid(completion: str, example: dict) -> bool:
    """Whether the completion's code can be parsed."""
    return _parsed(_before_tests(completion, example)) is not None


def check(example: dict) -> None:
    """UserError where a row has no tests, or tests that are not Python, and where code cannot be run here."""
    sandbox.check()
    try:
        ast.parse(_tests(example))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"its tests are not Python: {error}") from error


def program(completion: str, example: dict) -> str:
    """The completion's code, and the tests after it."""
    return f"{_before_tests(completion, example)}\n\n{_tests(example)}\n"


def code_of(completion: str) -> str:
    """What stands in its first code fence, closed or not; without a fence the whole completion."""
    fence = _FENCE.search(completion)
    return fence[1] if fence else completion


def _before_tests(completion: str, example: dict) -> str:
    """The completion's code; after the prompt where that begins the function, as HumanEval's does.

    Such a prompt has imports and helpers. The completion may define the function once more, or go on where it ends.
    """
    code, prompt, name = code_of(completion), example.get("prompt"), example.get("entry_point")
    if not isinstance(prompt, str) or name not in _functions(prompt):
        return code
    return f"{prompt}\n\n{code}" if name in _functions(code) else prompt + code


def _tests(example: dict) -> str:
    """The code of a row's tests; UserError where it has none, since whatever runs would pass then."""
    if "entry_point" in example and "test" in example:
        return f"{example['test']}\n\ncheck({example['entry_point']})"
    names = ["tests"] if "tests" in example else ["test_imports", "test_setup_code", "test_list"]
    if not example.get(names[-1]):
        raise UserError("has no tests; give the row 'tests', 'test' and 'entry_point', or 'test_list'")
    return "\n".join(_lines(example[name]) for name in names if example.get(name))


def _lines(code: object) -> str:
    if isinstance(code, str):
        return code
    if isinstance(code, list | tuple) and all(isinstance(line, str) for line in code):
        return "\n".join(code)
    raise UserError(f"its tests are {code!r}; they must be code, or a list of lines")


def _functions(code: str) -> set[str]:
    """The names of the functions that Python code defines; none where it is no Python."""
    parsed = _parsed(code)
    return {node.name for node in parsed.body if isinstance(node, ast.FunctionDef)} if parsed else set()


def _parsed(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two where it is nested deeply
        return None
