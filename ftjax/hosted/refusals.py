"""Why a request is not served, in the form that OpenAI's client reads."""

from collections.abc import Mapping
from typing import Any


class Refused(Exception):
    """Raised anywhere below a route; the application answers with `body` and `status`.

    Args:
      message: what is wrong and what to do about it.
      param: the key of the request that it is about.
      code: one word for programs, such as "model_not_found".
      status: 400 what the request says, 401 its key, 403 what the key may not do, 404 what is not there or another's,
        413 too large, 429 too much of it. Never 409: the client tries that again, although nothing would change.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        return {
            401: "authentication_error",
            403: "permission_error",
            429: "rate_limit_error",
            500: "server_error",
            503: "server_error",
        }.get(self.status, "invalid_request_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}
