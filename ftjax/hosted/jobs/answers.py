"""Rows of the database in the forms that OpenAI's client reads."""

from collections.abc import Sequence
from typing import Any

from ftjax.hosted.jobs.tables import Checkpoint, Event, Job

_SHARED = ("batch_size", "learning_rate_multiplier", "n_epochs")  # hyperparameters that every method has


def job(row: Job) -> dict[str, Any]:
    method = {"hyperparameters": row.hyperparameters} | ({"grader": row.grader} if row.grader else {})
    return {
        "id": row.id,
        "object": "fine_tuning.job",
        "created_at": row.created_at,
        "finished_at": row.finished_at,
        "status": row.status,
        "model": row.model,
        "fine_tuned_model": row.name if row.status == "succeeded" else None,
        "organization_id": row.owner,
        "training_file": row.training_file,
        "validation_file": row.validation_file,
        "result_files": row.result_files,
        "hyperparameters": {name: row.hyperparameters[name] for name in _SHARED},
        "method": {"type": row.method, row.method: method},
        "seed": row.seed,
        "trained_tokens": row.trained_tokens,
        "estimated_finish": row.estimated_finish if row.status == "running" else None,
        "integrations": [],
        "metadata": row.labels,
        "error": row.error,
    }


def event(row: Event) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "fine_tuning.job.event",
        "created_at": row.created_at,
        "level": row.level,
        "message": row.message,
        "type": row.type,
        "data": row.data,
    }


def checkpoint(row: Checkpoint) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": row.created_at,
        "fine_tuning_job_id": row.job,
        "fine_tuned_model_checkpoint": row.name,
        "step_number": row.step,
        "metrics": row.metrics,
    }


def page(data: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A list of one more than `limit` objects at most; the one beyond says that there are more."""
    shown = list(data[:limit])
    ids = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return {"object": "list", "data": shown, "has_more": len(data) > limit, **ids}
