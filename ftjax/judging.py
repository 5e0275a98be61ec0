"""What a judge of pairs says of completions: how many of the others of its prompt each is better than."""

import functools
import itertools
import json
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from ftjax import distributed, sharding
from ftjax.adapted import NONE, load_model
from ftjax.config_checks import is_endpoint
from ftjax.errors import UserError
from ftjax.evals import judge as judges
from ftjax.evals.judge import Judge
from ftjax.evals.scored import Question
from ftjax.rewards import stored_dtype

NAME = "judge"  # in metrics and records


def judge_of(config: ConfigDict) -> Judge:
    """The judge that config.objective names; a model here is read.

    Raises:
      UserError: there is no such model.
    """
    objective = config.objective
    if is_endpoint(objective.judge):
        return judges.endpoint(objective.judge, objective.judge_model, key=objective.judge_key)
    try:
        return _local(objective.judge)
    except UserError as error:
        raise UserError(f"config.objective.judge={objective.judge}: {error}") from error


@functools.cache
def _local(source: str) -> Judge:
    """Over all devices, once for all that is judged."""
    with jax.set_mesh(sharding.make_mesh({"fsdp": -1})):
        base, variables = load_model(source, {}, stored_dtype(source))
        return judges.local(base, variables[NONE])


def wins(judge: Judge, questions: Sequence[Question], texts: Sequence[str], samples: int) -> np.ndarray:
    """float64 [completions]: the share of the other completions of its prompt that each is better than, ties half.

    Every two are shown in both orders, and what changes with the order is a tie (`judge.win_rate`), as are equal ones,
    which nobody is asked about. All processes of a run get the same.

    questions, texts: of each completion, `samples` of a prompt beside each other.

    Raises:
      UserError: a judgement that fails, with the row.
    """
    pairs = [
        (first + i, first + j)
        for first in range(0, len(texts), samples)
        for i, j in itertools.combinations(range(samples), 2)
        if texts[first + i] != texts[first + j]
    ]
    outcomes = None
    if pairs and (judge.everywhere or distributed.is_first()):
        prompts = [questions[i].prompt for i, _ in pairs]
        answers = ([texts[pair[side]] for pair in pairs] for side in (0, 1))
        origins = [prompt.origin for prompt in prompts]
        outcomes = judges.win_rate(judge, list(map(judges.text_of, prompts)), *answers, origins)["outcomes"]
    outcomes = json.loads(distributed.tell(json.dumps(outcomes), limit=distributed.LOADING_SECONDS)) or []
    won = np.full(len(texts), 0.5 * (samples - 1))
    for (i, j), outcome in zip(pairs, outcomes, strict=True):
        won[i] += outcome - 0.5
        won[j] -= outcome - 0.5
    return won / (samples - 1)
