"""Tasks by name, for `task:NAME` in a config.

A task is a module with `train_examples(n=None, seed=0)` and `test_examples(n=None, seed=0)`, which return rows of one
format: `{"messages": [...]}` ending with the expected assistant turn, or pairs, or answers with labels. It may have
`score(completion, example)`, a number in [0, 1], without which its rows have a loss alone, and
`valid(completion, example)`: whether a completion has the form that is wanted, right or wrong.
"""

from types import ModuleType, SimpleNamespace

from ftjax.errors import UserError, did_you_mean
from ftjax.tasks import reasoning_gym, support_labeled, support_preference, support_ticket

_TASKS = {
    "support_ticket": support_ticket,
    "support_preference": support_preference,
    "support_labeled": support_labeled,
}


def get(name: str) -> ModuleType | SimpleNamespace:
    """The task called `name`; `UserError` with the known names for any other."""
    if name.startswith(reasoning_gym.PREFIX):
        return reasoning_gym.task(name.removeprefix(reasoning_gym.PREFIX))
    if name not in _TASKS:
        raise UserError(f"task:{name}: no such task{did_you_mean(name, _TASKS)}")
    return _TASKS[name]


def examples(task: ModuleType | SimpleNamespace, split: str) -> list[dict]:
    """The task's examples of split "train" or "test"."""
    splits = {"train": task.train_examples, "test": task.test_examples}
    if split not in splits:
        raise UserError(f"a task has the splits {' and '.join(splits)}, not {split!r}")
    return splits[split]()
