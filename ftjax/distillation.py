"""What on-policy distillation has beside the model that learns: its teacher, and batches that the model writes itself.

Whether it writes a batch, and what, follows from (seed, index) and the state, so that a run that goes on learns from
the same batches.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax import distributed, lora, sharding
from ftjax.assemble import Base, Program, base_facts, open_base
from ftjax.data.batch import packing
from ftjax.data.batch.loader import Loader
from ftjax.data.format.example import Document
from ftjax.episodes import make_complete, single
from ftjax.errors import UserError
from ftjax.method import method_of
from ftjax.models.params import abstract_params
from ftjax.objectives.reference import TEACHER, policy_and_reference
from ftjax.rollouts import Record, lay
from ftjax.sampling import stop_strings
from ftjax.sampling.engine import Completion
from ftjax.training.source import Batch
from ftjax.training.state import TrainState
from ftjax.tree import Tree, combine, flatten, unflatten
from ftjax.weights.load import load_params
from ftjax.weights.peft.adapter import StoredAdapter, base_digest, directory_digest, open_adapter
from ftjax.weights.peft.keys import EMBEDDING


def open_teacher(config: ConfigDict, base: Base) -> Base | None:
    """The model that config.objective.teacher names, not read yet; None for a method that learns from no other model.

    Raises:
      UserError: its tokens are not those of `base`, or it has no logits for some of them; config.objective
        .teacher_adapter names no adapter of it.
    """
    if not method_of(config).distills:
        return None
    model = configs.changed(config, {"model.source": config.objective.teacher, "model.revision": ""}).model
    model.update(add_tokens=(), resize_vocab=False, neftune_alpha=0.0, remat="none")
    directory = config.objective.teacher_adapter
    teacher = open_base(model, adapter=Path(directory).expanduser() if directory else None)
    ours, theirs = base.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    where = f"config.objective.teacher={config.objective.teacher}"
    if differing := sorted(ours.items() ^ theirs.items()):
        token, number = differing[0]
        raise UserError(
            f"{where}: its vocabulary is not that of {base.source}, such as in {token!r}, {number}; probabilities of "
            "tokens can be compared only between models with the same ones: name a teacher of the same family"
        )
    if teacher.model.spec.vocab_size <= (last := max(theirs.values())):
        raise UserError(
            f"{where}: it has {teacher.model.spec.vocab_size} logits, which do not reach its tokenizer's token {last}; "
            "name another teacher"
        )
    if (adapter := _adapter(config, teacher)) is not None:
        adapter.check_base(base_facts(config, teacher), teacher.reader)
    return teacher


def _adapter(config: ConfigDict, teacher: Base) -> StoredAdapter | None:
    """What config.objective.teacher_adapter names; UserError where it is none that can be merged into `teacher`."""
    if not config.objective.teacher_adapter:
        return None
    where, spec = f"config.objective.teacher_adapter={config.objective.teacher_adapter}", teacher.model.spec
    adapter = open_adapter(Path(config.objective.teacher_adapter), spec)
    if adapter.kind:
        raise UserError(f"{where}: is a model {adapter.kind}, whose head gives no tokens; name the adapter of another")
    if spec.tie_word_embeddings and EMBEDDING in adapter.modules:
        raise UserError(
            f"{where}: adapts an embedding that is the output head too, which takes no part in it; write both as a "
            "whole model (ftjax.export --format merged), and name that as config.objective.teacher alone"
        )
    return adapter


def teacher_digest(config: ConfigDict, teacher: Base) -> str:
    """sha256 (hex) of the model, and of the adapter that it is used with."""
    digest, adapter = base_digest(teacher.reader, teacher.model.spec), config.objective.teacher_adapter
    return f"{digest}+{directory_digest(Path(adapter).expanduser())}" if adapter else digest


def with_teacher(frozen: Tree, config: ConfigDict, teacher: Base | None, program: Program) -> Tree:
    """`frozen` with the teacher's variables beside them, read from its files, an adapter merged into them."""
    if teacher is None:
        return frozen
    params = load_params(teacher.reader, teacher.model.spec, abstract_params(teacher.model, program.mesh))
    if (adapter := _adapter(config, teacher)) is not None:
        adapters, saved = adapter.read()
        leaves = flatten(params)
        for path, values in saved.items():
            leaves[path] = jax.device_put(values.astype(leaves[path].dtype), leaves[path].sharding)
        params = lora.merge(unflatten(leaves), jax.device_put(adapters, sharding.replicated(program.mesh)))
    return frozen | {TEACHER: {"params": params}}


def check(config: ConfigDict, loader: Loader) -> None:
    """UserError where a row of `loader` is none whose answer the model could write itself."""
    if not (method_of(config).distills and config.objective.student_share):
        return
    stop_strings.check(config.rollouts.stop_strings, "config.rollouts.stop_strings")
    examples, room = loader.examples, loader.max_length - config.rollouts.max_new_tokens
    for i in range(len(examples)):
        prompt = len(_prompt(examples.documents_of(i)[0]))
        if prompt < 2:
            raise UserError(
                f"{examples.origin(i)}: there is no prompt that the model could answer; leave plain texts out, or "
                "learn from the rows alone: --config.objective.student_share=0"
            )
        if prompt > room:
            raise UserError(
                f"{examples.origin(i)}: its prompt has {prompt} tokens, which leaves no room for a completion of "
                f"{config.rollouts.max_new_tokens} (config.rollouts.max_new_tokens) within {loader.max_length}; set "
                f"--config.data.max_length={prompt + config.rollouts.max_new_tokens} or more, or leave the row out"
            )


def _prompt(document: Document) -> np.ndarray:
    """The tokens before the last answer: before the last run of trained ones."""
    last = int(np.flatnonzero(document.trained)[-1])
    untrained = np.flatnonzero(~document.trained[:last])
    return document.tokens[: untrained[-1] + 1]


class Distilled:
    """The `training.source.Source` of a method whose model learns from another what to say after its own beginnings.

    With probability config.objective.student_share a batch has completions that the model writes to its rows' prompts,
    all tokens before the last answer; else the rows as they are. between: see `episodes.make_complete`.
    """

    updates = 1

    def __init__(
        self,
        config: ConfigDict,
        base: Base,
        frozen: Tree,
        loader: Loader,
        workdir: Path,
        between: Callable[[], None] | None = None,
    ):
        self._config, self._base, self._frozen, self._loader = config, base, frozen, loader
        self._complete, self._said = make_complete(config, base, between), Record(workdir)

    def batch(self, index: int, state: TrainState) -> Batch:
        draw = np.random.default_rng((self._config.seed, index)).random()
        if draw < self._config.objective.student_share:
            return self._written(index, state)
        arrays = self._loader.batch(index)
        return Batch(arrays, self._loader.batch_tokens(index), {"student_written": 0.0})

    def epoch_at(self, index: int) -> float:
        return self._loader.epoch_at(index)

    def __enter__(self) -> "Distilled":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def _written(self, index: int, state: TrainState) -> Batch:
        examples = self._loader.examples
        rows = [examples.documents_of(i)[0] for i in self._loader.batch_examples(index)]
        prompts = [_prompt(row) for row in rows]
        policy, _ = policy_and_reference(combine(state.trainable, self._frozen))
        first = index * len(prompts)
        completions = self._complete(policy, prompts, range(first, first + len(prompts)))
        if distributed.is_first():
            self._record(index + 1, prompts[0], rows[0], completions[0])
        documents = [[single(one).document(prompt)] for prompt, one in zip(prompts, completions, strict=True)]
        arrays = lay(documents, self._loader.multiple, self._loader.max_length, packing.BATCH)
        lengths = np.array([len(one.logps) for one in completions])
        metrics = {
            "student_written": 1.0,
            "completions/mean_length": float(lengths.mean()),
            "completions/clipped_ratio": float(np.mean([not one.stopped for one in completions])),
        }
        return Batch(arrays, int((arrays["segment_ids"] > 0).sum()), metrics)

    def _record(self, step: int, prompt: np.ndarray, row: Document, completion: Completion) -> None:
        """From the tokens: of one row there may be an example for each of its answers."""
        answer = row.tokens[len(prompt) :][row.trained[len(prompt) :]]
        decode = self._base.tokenizer.decode
        expected, text = (decode(tokens, skip_special_tokens=True) for tokens in (answer, completion.tokens))
        self._said.add(step, decode(prompt), expected, [{"text": text}])
