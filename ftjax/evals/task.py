"""The score of a task: complete every prompt, compare with what was expected."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ftjax.data.chat import render_prompt


def score_task(
    task: Any, examples: list[dict], tokenizer: Any, complete: Callable[[list[np.ndarray]], list[np.ndarray]]
) -> tuple[float, list[dict]]:
    """The mean score over the examples, and one record per example: prompt, completion, expected, score.

    examples: as `task.test_examples()` gives them, each conversation ending in the expected assistant turn.
    complete: prompts as int32 tokens -> the generated tokens of each, without the end token.
    """
    prompts = [render_prompt(example["messages"][:-1], tokenizer) for example in examples]
    records = []
    for example, tokens in zip(examples, complete(prompts), strict=True):
        completion = tokenizer.decode(tokens, skip_special_tokens=True)
        *prompt, expected = example["messages"]
        records.append(
            {
                "prompt": prompt[-1]["content"],
                "completion": completion,
                "expected": expected["content"],
                "score": float(task.score(completion, example)),
            }
        )
    return sum(record["score"] for record in records) / len(records), records
