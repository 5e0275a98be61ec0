"""Checkpoints of a run: a thin layer over Orbax v1 that adds digests, a strict restore and safe retention.

A step is one directory, `checkpoints/<step>/`: `state/` (arrays), `meta/` (JSON: config, data position, fingerprint,
tokens) and `digests.json`. It is written as `writing-<step>` and renamed when it is complete, so a process that is
killed at any moment leaves either the whole step or none of it. Removal is the same: rename to `trash-<step>`, then
delete.

With several processes, each writes the arrays that its devices hold and digests its share of the files. The first one
joins the digests, renames, removes, and decides which step is loaded. All wait for each other before and after the
rename.

Two features of Orbax are not used: its removal of old steps leaves torn ones when interrupted, and `custom_metadata` is
silently empty when its file is lost. See `ftjax.training.digest` for the crcs.
"""

import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from ftjax import distributed
from ftjax.atomic import size
from ftjax.distributed import Meetings, is_first
from ftjax.errors import TransientError, UserError
from ftjax.training import digest

_WRITING = "writing-"  # Orbax, in turn, writes to `writing-<step>.orbax-checkpoint-tmp`
_TRASH = "trash-"
_ASIDE = ".set-aside"


class _Save(NamedTuple):
    """A save that is being written in the background, or has been."""

    step: int
    nbytes: int  # of its arrays, in all processes together
    future: Future


_opened = itertools.count()  # names the meetings of each `Checkpoints`; the same in all processes


def _context(partial: bool = False) -> ocp.Context:
    """Orbax's options, for a `with` around each call, because they are local to a thread.

    partial: leaves of a state that are not asked for stay on the disk.
    """
    registry = ocp.handlers.local_registry()
    # Without its own handler a dict would be stored as a tree of tensors.
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")
    context = ocp.Context()
    context.checkpointables.registry = registry
    context.pytree.loading.partial_load = partial
    return context


class Checkpoints:
    """The checkpoints in `directory`, the newest `keep` of them and the best one.

    The best is the step whose score (`rate`) is the smallest or the largest, among those that have one.
    There may be only one writer (`workdir.lock`), because opening removes what an interrupted save left.
    `read_only` neither creates nor removes anything, and works while another process writes.

    One save is written at a time, in the background. Every method but `check` waits for it first; if it failed, the
    next method that is called raises TransientError, once.

    With several processes all of them make the same calls in the same order, except `rate`; what fails in one of them
    fails in all.

    Raises UserError where `directory` cannot be created.
    """

    def __init__(
        self, directory: Path, keep: int = 3, best_mode: Literal["max", "min"] = "min", *, read_only: bool = False
    ):
        if keep < 1:
            raise UserError(f"checkpoints to keep: {keep} is less than 1, and the newest is always kept.")
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._best_mode = best_mode
        self._scores: dict[int, float] = {}
        self._read_only = read_only
        self._slowest = 0.0  # seconds that a save took
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: _Save | None = None
        name = f"checkpoints-{next(_opened)}"
        self._meetings, self._save_meetings = Meetings(name), Meetings(f"{name}-saving")  # one for each thread
        if not read_only:
            try:
                with self._meetings.together(f"opening {self.directory}"):
                    if is_first():
                        self.directory.mkdir(parents=True, exist_ok=True)
                        self._clean()
            except OSError as error:
                raise UserError(f"{self.directory} cannot be written: {error}. Choose another --workdir.") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except UserError as failed:
            if error is None:
                raise
            error.add_note(f"and: {failed}")  # the error on its way out is the first cause; hide neither

    def close(self) -> None:
        """Wait for the last save; without this call a run may lose its last step."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def wait(self) -> None:
        """Return when nothing is being written. Raises TransientError if the last save failed."""
        save, self._pending = self._pending, None
        if save is not None and (error := save.future.exception()) is not None:
            if is_first():
                self._clean()  # once more: when it failed, others of Orbax's threads were still writing
            raise TransientError(self._failed(save, error)) from error

    def check(self) -> None:
        """Raises what `wait` raises, once a save has failed; does not wait for one that is still being written."""
        if self._pending is not None and self._pending.future.done():
            self.wait()

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Write `state` (pytree of jax.Array, none of them of size 0) and `meta` (JSON) as `step`, in the background.

        Returns once the arrays are on the host: they may be donated and `meta` changed afterwards.

        Raises:
          TransientError: the save before this one failed.
          ValueError: opened read-only; `step` is not newer than all in the directory; an array has size 0.
          TypeError: not arrays, or not JSON (a tuple or an integer key would come back as something else).
        """
        if self._read_only:
            raise ValueError("these checkpoints were opened read-only")
        self.wait()
        started = time.monotonic()
        step = int(step)
        newest = max(self._numbered(), default=-1) if is_first() else -1
        if step <= newest:
            raise ValueError(f"step {step} is not newer than step {newest} in {self.directory}; see rewind()")
        leaves = digest.flatten(state)
        for name, leaf in leaves.items():
            if not isinstance(leaf, jax.Array):
                raise TypeError(f"{name} is a {type(leaf).__name__}, not a jax.Array")
            if leaf.size == 0:
                raise ValueError(f"{name} has size 0, which Orbax cannot store")
        frozen = json.loads(json.dumps(meta))
        if repr(frozen) != repr(meta):  # by repr, for which NaN equals NaN and (1,) does not equal [1]
            raise TypeError("meta changes on its way through JSON; use dict with str keys, list, str, int, float")
        path = self.directory / f"{_WRITING}{step}"
        blocks = digest.host_blocks(list(leaves.values()))
        described = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
        with _context():
            response = ocp.save_checkpointables_async(path, {"state": state, "meta": frozen})
        future = self._writer.submit(self._finish, started, step, path, response, described, blocks)
        self._pending = _Save(step, sum(leaf.nbytes for leaf in leaves.values()), future)

    def _finish(
        self, started: float, step: int, path: Path, response: ocp.AsyncResponse[None], leaves: dict, blocks: list
    ) -> None:
        """The part of a save that runs in the background; it began at `started` (`time.monotonic`)."""
        meet = self._save_meetings
        try:
            parts = digest.parts(leaves, blocks)  # while Orbax is writing
            blocks.clear()
            # A failure in this process alone cannot be reported to the others here: they may be waiting at a barrier
            # inside Orbax. The next call raises it, and that ends all processes (`distributed.connected`).
            response.result()
            with meet.together(f"writing step {step}"):
                pass
            files = json.loads(meet.tell(json.dumps(digest.files_of(path)) if is_first() else None))
            crcs = {name: digest.of_file(path / name) for name in _share(files)}
            gathered = [json.loads(text) for text in meet.collect(json.dumps([parts, crcs]))]
            with meet.together(f"committing step {step}"):
                if is_first():
                    all_crcs = {name: crc for _, shared in gathered for name, crc in shared.items()}
                    digest.write(path, step, digest.of_leaves(leaves, [parts for parts, _ in gathered]), all_crcs)
                    path.rename(self.directory / str(step))
        finally:
            if is_first():
                self._clean()  # also after a failed save: a full disk must get its space back
        with meet.together(f"removing steps before {step}"):
            if is_first():
                self._retire()
        self._slowest = max(self._slowest, time.monotonic() - started)

    def save_seconds(self, nbytes: int) -> float:
        """How long a save of so many bytes may take: what the slowest took, twice, or before the first a guess."""
        return 2 * self._slowest or 5 + nbytes / 100e6

    def steps(self) -> list[int]:
        """Complete steps, ascending."""
        self.wait()
        return self._complete()

    def latest(self) -> int | None:
        """The newest step, None if the directory holds none.

        Raises UserError where that is not complete: only the user may decide to use an older one or to start afresh.
        """
        self.wait()
        newest = max(self._numbered(), default=None)
        newest, complete = self._from_first([newest, newest in self._complete()])
        if newest is not None and not complete:
            raise self._unusable(newest, f"it is incomplete, {digest.FILE} is missing")
        return newest

    def rate(self, scores: Mapping[int, float]) -> None:
        """Record how good steps are, {step: score}, in place of all earlier scores; NaN is never the best.

        Scores last as long as this object.
        """
        self.wait()
        self._scores = {step: score for step, score in scores.items() if score == score}

    def restore(
        self, abstract_state: Any, step: int | None = None, *, partial: bool = False
    ) -> tuple[int, Any, dict[str, Any]]:
        """(step, state, meta) of `step`, by default the newest.

        `abstract_state` is a pytree of ShapeDtypeStruct with shardings, on any mesh; its paths, shapes and dtypes must
        be exactly those that were saved (nothing is cast). With `partial` it may be a part of the state, as nested
        dicts ({"trainable": ...}), and only that part is read into memory.

        Raises UserError where there is no such step, it is damaged, or its paths, shapes or dtypes differ (all listed).
        """
        step = self.latest() if step is None else step
        self.wait()
        if step is None:
            raise UserError(f"{self.directory} holds no checkpoint. Check --workdir, or train first.")
        if not self._from_first(step in self._numbered()):
            raise UserError(f"{self.directory} holds no step {step}. Complete steps: {self._complete() or 'none'}.")
        path = self.directory / str(step)
        try:
            record = digest.read(path)
        except ValueError as error:
            raise self._unusable(step, str(error)) from error
        if record["step"] != step:
            raise self._unusable(step, f"it was saved as step {record['step']}")
        mine = {name: record["files"][name] for name in _share(record["files"])}
        gathered = self._meetings.collect(json.dumps(digest.wrong_files(path, mine)))
        if wrong := self._from_first([name for names in map(json.loads, gathered) for name in names]):
            raise self._unusable(step, f"missing or damaged files: {', '.join(wrong)}")
        wanted = {name: digest.describe(leaf) for name, leaf in digest.flatten(abstract_state).items()}
        saved = {name: leaf for name, leaf in record["leaves"].items() if name in wanted or not partial}
        if lines := digest.differences(saved, wanted):
            raise UserError(
                f"checkpoint {path} does not fit this run's state; set model, adapter and optimizer as they were, or "
                "start a new run with another --workdir:\n  " + "\n  ".join(lines)
            )
        with _context(partial):
            loaded = ocp.load_checkpointables(path, {"state": abstract_state, "meta": None})
        if wrong := self._wrong_leaves(record["leaves"], loaded["state"]):
            raise self._unusable(step, f"the digests of {len(wrong)} arrays do not match: {', '.join(wrong)}")
        return step, loaded["state"], loaded["meta"]

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the state of `step`, one of `steps()`."""
        with _context():
            return ocp.load_checkpointables(self.directory / str(step), {"meta": None})["meta"]

    def rewind(self, step: int) -> None:
        """Rename all later steps to `<n>.set-aside`, where they stay until overwritten, to continue from `step`."""
        if self._read_only:
            raise ValueError("these checkpoints were opened read-only")
        self.wait()
        with self._meetings.together(f"going back to step {step}"):
            for later, path in self._numbered().items() if is_first() else ():
                if later > step:
                    aside = path.with_name(path.name + _ASIDE)
                    if aside.exists():
                        self._remove(aside)
                    path.rename(aside)

    def _from_first(self, value: Any) -> Any:
        """The first process's `value`, because a shared disk may look different from each host."""
        return json.loads(self._meetings.tell(json.dumps(value)))

    def _wrong_leaves(self, saved: dict[str, dict], state: Any) -> list[str]:
        """Paths of the leaves of `state` that differ from what was saved."""
        leaves = digest.flatten(state)
        parts = self._meetings.collect(json.dumps(digest.parts(leaves, digest.host_blocks(list(leaves.values())))))
        wrong = []
        if is_first():
            loaded = digest.of_leaves(leaves, [json.loads(text) for text in parts])
            wrong = [path for path in leaves if loaded[path] != saved.get(path)]
        return self._from_first(wrong)

    def _numbered(self) -> dict[int, Path]:
        """Every directory that looks like a step, complete or not, ascending."""
        return _numbered(self.directory)

    def _complete(self) -> list[int]:
        return complete_steps(self.directory)

    def _unusable(self, step: int, why: str) -> UserError:
        others = [other for other in self._complete() if other != step]
        fix = (
            f"Use another step (one of {others}): --config.checkpoint.resume_step=N to train on, --step=N elsewhere"
            if others
            else "There is no other complete step: restore the directory from a copy"
        )
        return UserError(
            f"checkpoint step {step} in {self.directory} cannot be loaded: {why}. {fix}, or start a new run with "
            "another --workdir."
        )

    def _failed(self, save: _Save, error: BaseException) -> str:
        complete = self._complete()
        free = shutil.disk_usage(self.directory).free
        what = "removing older steps after" if save.step in complete else "saving"
        again = f"resumes from step {complete[-1]} (there are {complete})" if complete else "begins again"
        return (
            f"{self.directory}: {what} step {save.step} failed: {_reason(error)}. A step takes about "
            f"{size(save.nbytes)} there, and {size(free)} are free. Free space or restore access, then run the same "
            f"command again: it {again}."
        )

    def _retire(self) -> None:
        """Remove all complete steps but the newest `keep` and the best."""
        complete = self._complete()
        for step in complete[: -self._keep]:
            if step != self._best(complete):
                self._remove(self.directory / str(step))

    def _best(self, steps: list[int]) -> int | None:
        extreme = {"max": max, "min": min}[self._best_mode]
        # Not step 0: older runs saved it, in which nothing is trained.
        scored = (step for step in steps if step and step in self._scores)
        return extreme(scored, key=self._scores.__getitem__, default=None)

    def _remove(self, path: Path) -> None:
        """Delete a directory; after an interruption no half of it remains under its own name."""
        trash = path.with_name(_TRASH + path.name)
        path.rename(trash)
        # A network disk keeps files that are still being read; the next cleaning removes them.
        shutil.rmtree(trash, ignore_errors=True)

    def _clean(self) -> None:
        """Remove the remains of interrupted saves and removals."""
        for path in self.directory.iterdir():
            if path.name.startswith((_WRITING, _TRASH)):
                shutil.rmtree(path, ignore_errors=True)


def complete_steps(directory: Path) -> list[int]:
    """The complete steps in a directory of checkpoints, ascending, for who only wants to know them."""
    return [step for step, path in _numbered(directory).items() if (path / digest.FILE).is_file()]


def _numbered(directory: Path) -> dict[int, Path]:
    if not directory.is_dir():
        return {}
    paths = [path for path in directory.iterdir() if path.name.isdecimal()]
    return {int(path.name): path for path in sorted(paths, key=lambda path: int(path.name))}


def _reason(error: BaseException) -> str:
    """What went wrong, in the operating system's words if it was a write, whose error number Orbax hides in a text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else f"{type(error).__name__}: {error}"


def _share(names: Iterable[str]) -> list[str]:
    """The files that this process digests."""
    return sorted(names)[distributed.index() :: distributed.count()]
