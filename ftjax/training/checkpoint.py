"""Checkpoints of a run: a thin layer over Orbax v1 that adds digests, a strict restore and safe retention.

A step is one directory, `checkpoints/<step>/`: `state/` (arrays), `meta/` (JSON: config, data position, fingerprint,
tokens) and `digests.json`. It is written as `writing-<step>` and appears by one rename when all of it is there, so a
process that is killed at any moment leaves either the whole step or none of it. Removal goes the same way: rename to
`trash-<step>`, then delete.

Of several processes each writes the arrays that its devices hold and digests its share of the files; the first one
joins the digests, renames and removes, and decides which step is meant. They meet before the rename and after it.

What Orbax offers and is not used: its own removal of steps tears them when interrupted, and `custom_metadata` is
silently empty when its file is lost. See `ftjax.training.digest` for the crcs.
"""

import itertools
import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
from orbax.checkpoint import v1 as ocp

from ftjax import distributed
from ftjax.distributed import Meetings, is_first
from ftjax.errors import TransientError, UserError
from ftjax.training import digest

_WRITING = "writing-"  # Orbax, in turn, writes to `writing-<step>.orbax-checkpoint-tmp`
_TRASH = "trash-"
_ASIDE = ".set-aside"

_opened = itertools.count()  # names the meetings of each `Checkpoints`; the same in all processes


def _context(partial: bool = False) -> ocp.Context:
    """Orbax's options; entered wherever Orbax is called, because they are local to a thread.

    partial: leaves of a state that are not asked for stay on the disk.
    """
    registry = ocp.handlers.local_registry()
    # Without a handler of its own a dict would become a tree of tensors.
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")
    context = ocp.Context()
    context.checkpointables.registry = registry
    context.pytree.loading.partial_load = partial
    return context


class Checkpoints:
    """The checkpoints in `directory`, the newest `keep` of them and the best one.

    The best is the step whose `score` is the smallest or the largest; steps without one do not take part.
    A writer must be the only one (`workdir.lock`): what an interrupted save left is removed when it opens.
    `read_only` neither creates nor removes anything, and may look on while another process writes.

    One save is written at a time, in the background. Its failure is raised, once, as TransientError by whichever method
    is called next. Every method waits for it first.

    With several processes all of them call each method, `score` apart, alike and in the same order; what fails in one
    of them fails in all.

    Raises:
      UserError: `directory` cannot be created.
    """

    def __init__(
        self,
        directory: Path,
        keep: int = 3,
        best_mode: Literal["max", "min"] = "min",
        *,
        read_only: bool = False,
    ):
        if keep < 1:
            raise UserError(f"checkpoints to keep: {keep} is less than 1, and the newest is always kept.")
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._best_mode = best_mode
        self._scores: dict[int, float] = {}
        self._read_only = read_only
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, Future] | None = None
        name = f"checkpoints-{next(_opened)}"
        self._here, self._behind = Meetings(name), Meetings(f"{name}-saving")  # of the caller's thread, of `_finish`
        if not read_only:
            try:
                with self._here.together(f"opening {self.directory}"):
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
        """Wait for the last save. A run that skips this has not saved its last step."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def wait(self) -> None:
        """Return when nothing is being written. Raises TransientError if the last save failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        step, future = pending
        error = future.exception()
        if error is not None:
            raise TransientError(
                f"{self.directory}: saving step {step}, or removing older steps after it, failed: "
                f"{type(error).__name__}: {error}. Free space or restore access, then run the same command again: it "
                f"resumes from step {max(self._complete(), default=0)}."
            ) from error

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Write `state` (pytree of jax.Array, none of them of size 0) and `meta` (JSON) as `step`, in the background.

        Returns once the arrays are on the host: they may be donated and `meta` changed afterwards.

        Raises:
          TransientError: the save before this one failed.
          ValueError, TypeError: not a step newer than all in the directory, not arrays, or not JSON (a tuple or an
            integer key would come back as something else).
        """
        if self._read_only:
            raise ValueError("these checkpoints were opened read-only")
        self.wait()
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
        self._pending = step, self._writer.submit(self._finish, step, path, response, described, blocks)

    def _finish(self, step: int, path: Path, response: ocp.AsyncResponse[None], leaves: dict, blocks: list) -> None:
        """The background half of a save."""
        meet = self._behind
        try:
            parts = digest.parts(leaves, blocks)  # while Orbax is writing
            blocks.clear()
            # What fails in this process alone is not told here: the others may wait for it at a barrier of Orbax's. It
            # is raised by the next call, and then ends them all (`distributed.connected`).
            response.result()
            with meet.together(f"writing step {step}"):
                pass
            files = json.loads(meet.tell(json.dumps(digest.files_of(path)) if is_first() else None))
            found = {name: digest.of_file(path / name) for name in _share(files)}
            told = [json.loads(text) for text in meet.collect(json.dumps([parts, found]))]
            with meet.together(f"committing step {step}"):
                if is_first():
                    crcs = {name: crc for _, of_one in told for name, crc in of_one.items()}
                    digest.write(path, step, digest.of_leaves(leaves, [parts for parts, _ in told]), crcs)
                    path.rename(self.directory / str(step))
        finally:
            if is_first():
                self._clean()  # of a save that failed: a full disk must get its space back
        with meet.together(f"removing steps before {step}"):
            if is_first():
                self._retire()

    def steps(self) -> list[int]:
        """Complete steps, ascending."""
        self.wait()
        return self._complete()

    def latest(self) -> int | None:
        """The newest step, None if the directory holds none.

        Raises:
          UserError: the newest step is not complete. Falling back to an older one, or to a start from nothing, is for
            the user to ask for.
        """
        self.wait()
        newest = max(self._numbered(), default=None)
        newest, whole = self._of_first([newest, newest in self._complete()])
        if newest is not None and not whole:
            raise self._unusable(newest, f"it is incomplete, {digest.FILE} is missing")
        return newest

    def score(self, step: int, value: float) -> None:
        """Tell how good a saved step is; NaN is never the best. Scores last as long as this object."""
        self.wait()
        if value == value:
            self._scores[step] = value

    def best(self) -> int | None:
        """The step with the best score (the earliest of equals), None if none has one."""
        self.wait()
        return self._of_first(self._best(self._complete()))

    def restore(
        self, abstract_state: Any, step: int | None = None, *, partial: bool = False
    ) -> tuple[int, Any, dict[str, Any]]:
        """(step, state, meta) of `step`, by default the newest.

        `abstract_state` is a pytree of ShapeDtypeStruct with shardings, on any mesh; its paths, shapes and dtypes must
        be exactly those that were saved (nothing is cast). With `partial` it may be a part of the state, as nested
        dicts ({"trainable": ...}), and only that part is read into memory.

        Raises:
          UserError: there is no such step; it is damaged; or it has other paths, shapes or dtypes (all are listed).
        """
        step = self.latest() if step is None else step
        self.wait()
        if step is None:
            raise UserError(f"{self.directory} holds no checkpoint. Check --workdir, or train first.")
        if not self._of_first(step in self._numbered()):
            raise UserError(f"{self.directory} holds no step {step}. Complete steps: {self._complete() or 'none'}.")
        path = self.directory / str(step)
        record = self._record(step)
        mine = {name: record["files"][name] for name in _share(record["files"])}
        if wrong := self._found_by_any(digest.wrong_files(path, mine)):
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

    def rewind(self, step: int) -> None:
        """Set all steps after `step` aside (`<n>.set-aside`, until they are overwritten), to go on from `step`."""
        if self._read_only:
            raise ValueError("these checkpoints were opened read-only")
        self.wait()
        with self._here.together(f"going back to step {step}"):
            for later, path in self._numbered().items() if is_first() else ():
                if later > step:
                    aside = path.with_name(path.name + _ASIDE)
                    if aside.exists():
                        self._remove(aside)
                    path.rename(aside)

    def _of_first(self, found: Any) -> Any:
        """What the first process has found: a disk that several hosts share may show each of them another moment."""
        return json.loads(self._here.tell(json.dumps(found)))

    def _found_by_any(self, names: list[str]) -> list[str]:
        """The names that any process has found, in all of them."""
        told = self._here.collect(json.dumps(names))
        return json.loads(self._here.tell(json.dumps([name for text in told for name in json.loads(text)])))

    def _wrong_leaves(self, saved: dict[str, dict], state: Any) -> list[str]:
        """Paths of the leaves of `state` that differ from what was saved."""
        leaves = digest.flatten(state)
        told = self._here.collect(json.dumps(digest.parts(leaves, digest.host_blocks(list(leaves.values())))))
        if not told:
            return json.loads(self._here.tell(None))
        loaded = digest.of_leaves(leaves, [json.loads(text) for text in told])
        return json.loads(self._here.tell(json.dumps([path for path in leaves if loaded[path] != saved.get(path)])))

    def _numbered(self) -> dict[int, Path]:
        """All that looks like a step, whole or not, ascending."""
        if not self.directory.is_dir():
            return {}
        paths = [path for path in self.directory.iterdir() if path.name.isdecimal()]
        return {int(path.name): path for path in sorted(paths, key=lambda path: int(path.name))}

    def _complete(self) -> list[int]:
        return [step for step, path in self._numbered().items() if (path / digest.FILE).is_file()]

    def _unusable(self, step: int, why: str) -> UserError:
        others = [other for other in self._complete() if other != step]
        mend = (
            f"Use another step (one of {others}): --config.checkpoint.resume_step=N to train on, --step=N elsewhere"
            if others
            else "There is no other complete step: restore the directory from a copy"
        )
        return UserError(
            f"checkpoint step {step} in {self.directory} cannot be loaded: {why}. {mend}, or start a new run with "
            "another --workdir."
        )

    def _record(self, step: int) -> dict[str, Any]:
        try:
            record = digest.read(self.directory / str(step))
        except ValueError as error:
            raise self._unusable(step, str(error)) from error
        if record["step"] != step:
            raise self._unusable(step, f"it was saved as step {record['step']}")
        return record

    def _retire(self) -> None:
        """Remove all complete steps but the newest `keep` and the best."""
        complete = self._complete()
        for step in complete[: -self._keep]:
            if step != self._best(complete):
                self._remove(self.directory / str(step))

    def _best(self, steps: list[int]) -> int | None:
        choose = {"max": max, "min": min}[self._best_mode]
        return choose((step for step in steps if step in self._scores), key=self._scores.__getitem__, default=None)

    def _remove(self, path: Path) -> None:
        """Delete a directory such that no half of it ever stands under its name."""
        trash = path.with_name(_TRASH + path.name)
        path.rename(trash)
        # A network disk keeps files that somebody still reads: what stays of it goes the next time.
        shutil.rmtree(trash, ignore_errors=True)

    def _clean(self) -> None:
        """Remove what an interrupted save or removal left."""
        for path in self.directory.iterdir():
            if path.name.startswith((_WRITING, _TRASH)):
                shutil.rmtree(path, ignore_errors=True)


def _share(names: Any) -> list[str]:
    """Those of the files that this process digests."""
    return sorted(names)[distributed.index() :: distributed.count()]
