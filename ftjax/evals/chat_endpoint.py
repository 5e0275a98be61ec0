"""Replies of a model behind an OpenAI-compatible endpoint (POST /chat/completions), several asked for at once."""

import os
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ftjax.errors import TransientError, UserError

_LONGEST_WAIT = 60.0  # seconds between two tries

Question = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Endpoint:
    """endpoint(questions) -> the replies, in their order; a question is the turn of a user, or a conversation.

    Attributes:
      url: up to and including the version, such as https://api.openai.com/v1.
      key: the environment variable with the API key; "" for servers that want none.
      options: further members of each request's body.
      at_once: how many requests are under way at a time.
      timeout: seconds for one reply.
      tries: of a request that is answered with 429 or 5xx, or not at all.
      wait: seconds after the first failure, about twice as many after each further one; Retry-After counts as well.

    Raises:
      UserError: no key where one is wanted, and whatever the endpoint refuses, with what it says and the question.
      TransientError: no reply after all tries, with the question.
    """

    url: str
    model: str
    key: str = "OPENAI_API_KEY"
    options: dict[str, Any] = field(default_factory=lambda: {"temperature": 0})
    at_once: int = 8
    timeout: float = 120.0
    tries: int = 6
    wait: float = 1.0

    def __call__(self, questions: Sequence[Question], origins: Sequence[str] = ()) -> list[str]:
        return [choice["message"]["content"] for choice in self.choices(questions, origins)]

    def choices(self, questions: Sequence[Question], origins: Sequence[str] = ()) -> list[dict[str, Any]]:
        """The first choice of each reply as the endpoint gives it, {"message": {"content": str}, ...}.

        origins: what messages about each question begin with.
        """
        import httpx2

        headers = {}
        if self.key:
            if not (secret := os.environ.get(self.key, "").strip()):
                raise UserError(f"{self.url} needs a key; set the environment variable {self.key}")
            headers = {"Authorization": f"Bearer {secret}"}
        with httpx2.Client(headers=headers, timeout=self.timeout) as client:
            pool = ThreadPoolExecutor(self.at_once)
            try:
                named = zip(questions, [f"{origin}: " for origin in origins] or [""] * len(questions), strict=True)
                replies = [pool.submit(self._ask, client, *both) for both in named]
                return [reply.result() for reply in replies]
            finally:
                pool.shutdown(cancel_futures=True)  # after an error nothing further is asked

    def _ask(self, client: Any, question: Question, where: str) -> dict[str, Any]:
        import httpx2

        messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        body, question = {"model": self.model, "messages": messages, **self.options}, messages[-1]["content"]
        for attempt in range(self.tries):
            pause = min(self.wait * 2**attempt * random.uniform(0.75, 1.25), _LONGEST_WAIT)
            try:
                response = client.post(f"{self.url.rstrip('/')}/chat/completions", json=body)
            except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
                raise UserError(
                    f"{where}{self.url}: {error}; the URL of an endpoint is like https://HOST/v1"
                ) from error
            except httpx2.TransportError as error:
                trouble = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200:
                    return self._choice(response, question, where)
                trouble = f"status {response.status_code}: {response.text[:500]}"
                if response.status_code != 429 and response.status_code < 500:
                    raise UserError(f"{where}{self.url} refuses {self.model}: {trouble}; it was asked:\n{question}")
                pause = max(pause, _seconds(response.headers.get("Retry-After")))
            if attempt + 1 < self.tries:
                time.sleep(pause)
        raise TransientError(
            f"{where}{self.url} did not reply in {self.tries} tries: {trouble}; it was asked:\n{question}"
        )

    def _choice(self, response: Any, question: str, where: str) -> dict[str, Any]:
        try:
            choice = response.json()["choices"][0]
            content = choice["message"]["content"]
        except (ValueError, LookupError, TypeError):
            content = None
        if not isinstance(content, str):
            raise UserError(f"{where}{self.url}: no chat completion: {response.text[:500]}; it was asked:\n{question}")
        return choice


def _seconds(retry_after: str | None) -> float:
    """Of a Retry-After header; 0 where it is absent or a date."""
    return min(float(retry_after), _LONGEST_WAIT) if retry_after and retry_after.isdecimal() else 0.0
