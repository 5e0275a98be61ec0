"""Completions for Tinker's client: the engine's, of the base or of an adapter that training has just saved."""

import asyncio
import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ftjax import adapted, sharding
from ftjax.hosted.generation import STOPS, Generation, Writing
from ftjax.hosted.logs import log
from ftjax.hosted.refusals import Refused
from ftjax.hosted.tinker import bodies, checkpoints, wire
from ftjax.hosted.tinker.training import Programs, prompt_logps
from ftjax.hosted.tinker.work import Asked, Failed, Work
from ftjax.sampling.request import LIKELIEST, Completion, Request
from ftjax.sampling.sampler import Sampling
from ftjax.sampling.stop_strings import stops_at
from ftjax.tree import Tree
from ftjax.weights.peft.adapter import BaseFacts

PASSING = 8  # snapshots without a name of a model that are kept, the newest
_SCORED = 2  # adapters that are loaded for what they say of prompts
_NOT_HERE = {
    "target_prompt_logprobs": "the logprobs of tokens in place of a prompt's",
    "prompt_alt_tokens_k": "draws in place of a prompt's tokens",
    "record_stability_info": "stability information",
}


class Sampler(NamedTuple):
    """What a client samples from. run: the model that a snapshot without a name is of."""

    owner: str
    session: str
    path: str | None
    adapter: Path | None
    run: str | None = None
    inflight: bool = False


class Samplers:
    """The sampling sessions, which end with the server.

    name: of the base.
    """

    def __init__(self, generation: Generation, programs: Programs, facts: BaseFacts, name: str, work: Work):
        self._generation, self._programs, self._facts, self._name, self._work = generation, programs, facts, name, work
        self._lock = threading.Lock()  # of the two that follow
        self._samplers: dict[str, Sampler] = {}
        self._kept: dict[str, list[Path]] = {}  # snapshots by model, the oldest first
        self._scored: OrderedDict[Path, Tree] = OrderedDict()  # the worker's
        self._tasks: dict[str, asyncio.Task] = {}

    def add(self, id: str, owner: str, session: str, path: str | None, adapter: Path | None) -> None:
        with self._lock:
            self._samplers[id] = Sampler(owner, session, path, adapter)

    def passing(self, id: str, owner: str, session: str, run: str, directory: Path, inflight: bool) -> None:
        """One of a snapshot in `directory`, which goes once there are newer ones or the session ends.

        inflight: those that are so share the newest snapshot of their model.
        """
        adapter = directory / checkpoints.ADAPTER
        with self._lock:
            kept = self._kept.setdefault(run, [])
            kept.append(directory)
            old = [kept.pop(0) for _ in range(len(kept) - PASSING)]
            for other, sampler in self._samplers.items() if inflight else ():
                if sampler.run == run and sampler.inflight:
                    self._samplers[other] = sampler._replace(adapter=adapter)
            self._samplers[id] = Sampler(owner, session, None, adapter, run, inflight)
        for directory in old:
            shutil.rmtree(directory, ignore_errors=True)

    def end(self, session: str) -> None:
        """Forgets the samplers of a session and deletes its snapshots."""
        with self._lock:
            ended = {id: sampler for id, sampler in self._samplers.items() if sampler.session == session}
            for id in ended:
                del self._samplers[id]
            runs = {sampler.run for sampler in ended.values() if sampler.run}
            old = [directory for run in runs for directory in self._kept.pop(run, [])]
        for directory in old:
            shutil.rmtree(directory, ignore_errors=True)

    def describe(self, id: str, owner: str) -> dict[str, Any]:
        return {"sampler_id": id, "base_model": self._name, "model_path": self.find(id, owner).path}

    def find(self, id: str, owner: str) -> Sampler:
        with self._lock:
            found = self._samplers.get(id)
        if found is None or found.owner != owner:
            raise Refused(
                f"there is no sampling session {id!r}; the server may have been started anew since it was made",
                param="sampling_session_id",
                code="sampler_not_found",
                status=404,
            )
        return found

    def of_session(self, session: str) -> list[str]:
        with self._lock:
            return [id for id, sampler in self._samplers.items() if sampler.session == session]

    def sample(self, owner: str, body: bodies.Sample) -> tuple[str, list[str]]:
        """Begins; on the event loop. Returns the id of the request and of each of its sequences."""
        id = f"{body.sampling_session_id}:{body.seq_id}"
        ids = [f"{id}:{index}" for index in range(body.num_samples)]
        sampler = self.find(body.sampling_session_id or "", owner)
        if id in self._tasks:  # its answer was lost on the way
            return id, ids
        if sampler.adapter is not None and not sampler.adapter.is_dir():
            raise Refused(
                f"the weights of {body.sampling_session_id!r} are gone: of snapshots without a name the newest "
                f"{PASSING} are kept; make a new sampling client",
                code="sampler_not_found",
                status=404,
            )
        prompt = self._prompt(body)
        requests = self._requests(body, prompt)
        asked, new = self._work.open(id, owner)
        if not new:
            return id, ids
        try:
            writing = self._generation.ask(requests, sampler.adapter, logps=True)
        except Refused as refused:
            self._work.drop(asked)
            if refused.code == "overloaded":  # for which the client waits, and tries again
                refused.status = 429
            raise
        task = asyncio.get_running_loop().create_task(self._answer(asked, writing, body, prompt, sampler.adapter))
        self._tasks[id] = task
        task.add_done_callback(lambda _: self._tasks.pop(id, None))
        return id, ids

    def cancel(self, id: str, owner: str) -> None:
        """Gives up what is being sampled; on the event loop."""
        self._work.find(id, owner)
        if (task := self._tasks.get(id)) is not None:
            task.cancel()

    async def _answer(
        self, asked: Asked, writing: Writing, body: bodies.Sample, prompt: np.ndarray, adapter: Path | None
    ) -> None:
        completions: list[Completion | None] = [None] * body.num_samples
        try:
            scored = None
            if body.prompt_logprobs or body.topk_prompt_logprobs:
                score = self._work.submit(
                    f"{asked.id}:prompt", asked.owner, lambda: self._score(prompt, adapter, body.topk_prompt_logprobs)
                )
                scored = asyncio.wrap_future(score.future)
                scored.add_done_callback(lambda its: its.cancelled() or its.exception())  # also if nobody waits then
            async for part in writing:
                if part.completion is not None:
                    completions[part.request] = part.completion
            sequences = [_sampled(its, body.topk_sample_logprobs) for its in completions if its is not None]
            logps, likeliest = await scored if scored is not None else (None, None)
            if body.prompt_logprobs_last_n is not None:
                logps, likeliest = _last(body.prompt_logprobs_last_n, logps, likeliest)
            output = wire.sample_output(sequences, logps if body.prompt_logprobs else None, likeliest)
            self._work.finish(asked, output)
        except Refused as refused:
            self._work.finish(asked, error=Failed(refused.message, by_user=refused.status < 500))
        except Failed as failed:
            self._work.finish(asked, error=failed)
        except asyncio.CancelledError:
            self._work.finish(asked, error=Failed("it was cancelled", by_user=True))
            raise
        except Exception:
            log.exception("a sample of Tinker's client failed", extra={"fields": {"request": asked.id}})
            why = f"the server failed; its log has more under {asked.id}"
            self._work.finish(asked, error=Failed(why, by_user=False))
        finally:
            writing.close()

    def _prompt(self, body: bodies.Sample) -> np.ndarray:
        for name, what in _NOT_HERE.items():
            if getattr(body, name):
                raise Refused(f"{name}: there is none of {what} here; leave it out", param=name)
        for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
            if getattr(body, name) > LIKELIEST:
                raise Refused(f"{name} is {getattr(body, name)}; at most {LIKELIEST} are told", param=name)
        tokens = [token for chunk in body.prompt.chunks for token in chunk.tokens]
        vocabulary = self._programs.model.spec.vocab_size
        if not tokens:
            raise Refused("the prompt is empty; give it at least one token", param="prompt")
        if max(tokens) >= vocabulary:
            raise Refused(
                f"the prompt has the token {max(tokens)}; the model's are 0 to {vocabulary - 1}", param="prompt"
            )
        last = body.prompt_logprobs_last_n
        if last is not None and (not body.prompt_logprobs or last >= len(tokens)):
            raise Refused(
                f"prompt_logprobs_last_n goes with prompt_logprobs, and is below the prompt's {len(tokens)} tokens",
                param="prompt_logprobs_last_n",
            )
        return np.asarray(tokens, np.int32)

    def _requests(self, body: bodies.Sample, prompt: np.ndarray) -> list[Request]:
        params, base = body.sampling_params, self._generation.base
        room = self._generation.room(len(prompt), params.max_tokens, "prompt")
        # As the client says: None is the model's own ends, a list is instead of them; but text stops beside them, since
        # an end token has none.
        stops: Sequence[Any] = [params.stop] if isinstance(params.stop, str) else (params.stop or [])
        if len(stops) > STOPS:
            raise Refused(f"stop has {len(stops)} ends; use up to {STOPS}", param="stop")
        texts = [stop for stop in stops if isinstance(stop, str)]
        tokens = [stop for stop in stops if isinstance(stop, int)]
        if params.stop is None or texts:
            tokens = list(base.end_tokens)
        seed = secrets.randbits(32) if params.seed is None else params.seed % 2**32
        sampling = Sampling(params.temperature, max(params.top_k, 0), params.top_p, seed)
        ends: Callable | None = stops_at(texts, base.tokenizer, "stop") if texts else None
        made = [
            Request(
                prompt,
                room,
                sampling,
                tokens,
                number=index,
                stops_at=ends,
                likeliest=bool(body.topk_sample_logprobs),
            )
            for index in range(body.num_samples)
        ]
        made[0].check(base.model, "the prompt")
        return made

    def _score(self, prompt: np.ndarray, adapter: Path | None, likeliest: int) -> tuple:
        """The worker's: what the sampler says of a prompt."""
        return prompt_logps(self._programs, self._loaded(adapter), prompt, likeliest)

    def _loaded(self, adapter: Path | None) -> Tree | None:
        if adapter is None:
            return None
        if adapter not in self._scored:
            host = adapted.of_rows(self._programs.base, self._facts, adapter)
            self._scored[adapter] = jax.device_put(host, sharding.replicated(self._programs.mesh))
            while len(self._scored) > _SCORED:
                self._scored.popitem(last=False)
        self._scored.move_to_end(adapter)
        return self._scored[adapter]


def _sampled(completion: Completion, likeliest: int) -> wire.Sampled:
    """With the token that ended it, as the client has it: it was drawn, and is trained on, as all others."""
    ended = [] if completion.stop_token is None else [completion.stop_token]
    tokens = np.concatenate([completion.tokens, np.asarray(ended, np.int32)])
    topk = None
    if likeliest and completion.likeliest is not None and completion.likeliest_logps is not None:
        topk = wire.Topk(completion.likeliest[:, :likeliest], completion.likeliest_logps[:, :likeliest])
    return wire.Sampled(tokens, completion.full_logps[: len(tokens)], completion.stopped, topk)


def _last(count: int, logps: np.ndarray, likeliest: wire.Topk | None) -> tuple[np.ndarray, wire.Topk | None]:
    """Without what is said of the tokens before the last `count`."""
    logps = np.where(np.arange(len(logps)) < len(logps) - count, np.nan, logps)
    if likeliest is not None:
        likeliest.tokens[:-count], likeliest.logps[:-count] = 0, wire.NOTHING
    return logps, likeliest
