"""/v1/fine_tuning/jobs and what belongs to them, as OpenAI's client calls them."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from ftjax.hosted.jobs import answers
from ftjax.hosted.jobs.jobs import Jobs
from ftjax.hosted.jobs.requests import NewJob
from ftjax.hosted.refusals import Refused

_PATH = "/v1/fine_tuning/jobs"
_PERMISSIONS = "/v1/fine_tuning/checkpoints/{name:path}/permissions"
Limit = Annotated[int, Query(ge=1, le=100)]


def routes(jobs: Jobs) -> APIRouter:
    router = APIRouter()

    @router.post(_PATH)
    def create(asked: NewJob, request: Request) -> dict[str, Any]:
        return answers.job(jobs.create(asked, request.state.owner))

    @router.get(_PATH)
    def listed(request: Request, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
        owner, labels = request.state.owner, _labels(request)
        rows = jobs.unlabeled(owner, after, limit) if labels is None else jobs.all(owner, after, limit, labels)
        return answers.page([answers.job(row) for row in rows], limit)

    @router.get(_PATH + "/{id}")
    def retrieve(id: str, request: Request) -> dict[str, Any]:
        return answers.job(jobs.find(id, request.state.owner))

    @router.post(_PATH + "/{id}/cancel")
    def cancel(id: str, request: Request) -> dict[str, Any]:
        return answers.job(jobs.cancel(id, request.state.owner))

    @router.post(_PATH + "/{id}/pause")
    def pause(id: str, request: Request) -> dict[str, Any]:
        return answers.job(jobs.pause(id, request.state.owner))

    @router.post(_PATH + "/{id}/resume")
    def resume(id: str, request: Request) -> dict[str, Any]:
        return answers.job(jobs.resume(id, request.state.owner))

    @router.get(_PATH + "/{id}/events")
    def events(id: str, request: Request, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
        rows = jobs.events(id, request.state.owner, after, limit)
        return answers.page([answers.event(row) for row in rows], limit)

    @router.get(_PATH + "/{id}/checkpoints")
    def checkpoints(id: str, request: Request, after: str | None = None, limit: Limit = 10) -> dict[str, Any]:
        rows = jobs.checkpoints(id, request.state.owner, after, limit)
        return answers.page([answers.checkpoint(row) for row in rows], limit)

    @router.get(_PERMISSIONS)
    def permissions(name: str, request: Request) -> dict[str, Any]:
        """Nobody else has any: a model is its key's."""
        jobs.served(name, request.state.owner)
        return answers.page([], 1)

    @router.post(_PERMISSIONS)
    def permit(name: str, request: Request) -> dict[str, Any]:
        jobs.served(name, request.state.owner)
        raise Refused(
            "this server has no projects: a model is its key's alone, and permissions cannot be given",
            param="project_ids",
            code="unsupported",
            status=403,
        )

    @router.delete(_PERMISSIONS + "/{id}")
    def revoke(name: str, id: str, request: Request) -> dict[str, Any]:
        jobs.served(name, request.state.owner)
        raise Refused(f"{name} has no permission {id!r}", status=404)

    return router


def _labels(request: Request) -> dict[str, str] | None:
    """The filter metadata[KEY]=VALUE of a list; None for metadata=null, those that have none."""
    asked = request.query_params
    labels = {name[9:-1]: value for name, value in asked.items() if name.startswith("metadata[") and name[-1] == "]"}
    if "metadata" not in asked:
        return labels
    if asked["metadata"] != "null" or labels:
        raise Refused("metadata: filter with metadata[KEY]=VALUE, or with metadata=null alone", param="metadata")
    return None
