"""/v1/fine_tuning/alpha/graders: a grader tried on one answer, and whether it is one."""

import time
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field

from ftjax.errors import TransientError, UserError
from ftjax.evals.graders import Judges
from ftjax.hosted.jobs import trial
from ftjax.hosted.jobs.jobs import checked
from ftjax.hosted.jobs.requests import Asked
from ftjax.hosted.refusals import Refused
from ftjax.hosted.shares import Shares

_PATH = "/v1/fine_tuning/alpha/graders"
_AT_ONCE, _OF_KEY, _OPEN = 4, 2, 16  # trials at the same time, those of a key, and those of it that may wait, too
# What may go wrong, in OpenAI's words.
_ERRORS = (
    *("formula_parse_error", "invalid_variable_error", "model_grader_parse_error", "model_grader_refusal_error"),
    *("model_grader_server_error", "other_error", "python_grader_runtime_error", "python_grader_server_error"),
    *("sample_parse_error", "truncated_observation_error", "unresponsive_reward_error"),
)


class Run(Asked):
    grader: dict[str, Any]
    model_sample: str = Field(max_length=1_000_000)
    item: dict[str, Any] | None = None


class Validate(Asked):
    grader: dict[str, Any]


def routes(judges: Judges) -> APIRouter:
    router, shares = APIRouter(), Shares("trials of graders", _AT_ONCE, _OF_KEY, _OPEN)

    @router.post(_PATH + "/validate")
    def validate(asked: Validate) -> dict[str, Any]:
        return {"grader": checked(asked.grader, judges, "grader")}

    @router.post(_PATH + "/run")
    async def run(asked: Run, request: Request) -> dict[str, Any]:
        return await shares.run(request.state.owner, tried, asked)

    def tried(asked: Run) -> dict[str, Any]:
        grader = checked(asked.grader, judges, "grader")
        began = time.perf_counter()
        try:
            found = trial.grade(grader, asked.model_sample, asked.item or {}, judges)
        except TransientError:
            raise
        except UserError as error:
            raise Refused(str(error), param="item", code="invalid_grader") from error
        errors: dict[str, Any] = {name: name in found.errors for name in _ERRORS}
        errors["python_grader_runtime_error_details"] = found.errors.get("python_grader_runtime_error")
        errors["model_grader_server_error_details"] = found.errors.get("model_grader_server_error")
        errors["python_grader_server_error_type"] = None
        return {
            "reward": found.reward,
            "sub_rewards": found.parts if grader["type"] == "multi" else {},
            "model_grader_token_usage_per_model": {},
            "metadata": {
                "name": grader["name"],
                "type": grader["type"],
                "errors": errors,
                "execution_time": time.perf_counter() - began,
                "scores": found.parts,
                "token_usage": None,
                "sampled_model_name": grader.get("model"),
            },
        }

    return router
