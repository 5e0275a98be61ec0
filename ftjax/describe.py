"""A run in words, for the tables that are shown at its start and end."""

import shlex
import shutil
import sys
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax import memory, quant, sharding, tree
from ftjax.assemble import NEW_TOKENS, Base, Program
from ftjax.data.batch.loader import Loader
from ftjax.environments import ENVIRONMENT
from ftjax.evals.best import Standing, evaluations
from ftjax.evals.general import is_category
from ftjax.method import Method, iterations, learning_rate, ptx_rows
from ftjax.models import kernels, onednn, params
from ftjax.objectives.reference import REFERENCE
from ftjax.training import metrics
from ftjax.tree import Tree


def run(
    config: ConfigDict,
    asked: ConfigDict,
    base: Base,
    room: float | None,
    program: Program,
    loader: Loader,
    report: dict[str, int],
) -> dict[str, str]:
    """What is about to run.

    asked: the config before anything was chosen; room: bytes of a device's memory; report: that of `tokenize.tokenize`.
    """
    spec, adapter, data, mesh = base.model.spec, config.adapter, config.data, program.mesh
    abstract = program.variables
    trained, frozen = tree.partition(abstract, program.is_trained)
    packed = frozen.pop("quant", {})
    total = tree.count(abstract["params"]) + quant.count(packed)
    steps = config.steps or loader.batches_in(config.epochs) * iterations(config)
    epochs = loader.epoch_at(steps // iterations(config))
    model = base.model
    attention = kernels.choose(model.attention, spec, model.dtype, loader.max_length, mesh, model.matmul, model.shares)
    return {
        "model": f"{config.model.source}: {spec.family}, {spec.num_hidden_layers} layers, width {spec.hidden_size}, "
        f"vocabulary {spec.vocab_size:,}, {total:,} parameters, in {config.model.dtype}"
        f"{_multiplied(config, asked, mesh)}",
        "adapter": _adapter(adapter),
        **_new_tokens(config, base, trained),
        "trained": _size(trained, program.trained_count),
        **({"average": _average(config.optimizer.ema_decay)} if config.optimizer.ema_decay else {}),
        "frozen": _size(frozen),
        **_reference(config, program),
        **({"quantized": f"{_size(packed, quant.count(packed))}, {config.quantize.base}"} if packed else {}),
        "mesh": _mesh(mesh, base, abstract["params"]),
        "attention": attention.name + (f"; {attention.reason}" if attention.reason else ""),
        "data": counted(report) if program.method.answered else _prompts(report),
        "batch": _rollouts(config, loader)
        if not program.method.answered
        else f"{data.batch_size} rows of {loader.max_length} tokens"
        + (
            ", packed"
            if loader.packing
            else f", not packed but padded to {', '.join(map(str, loader.lengths))} tokens,"
        )
        + f" {loader.packing_efficiency():.1%} full: {_examples(loader)} an update"
        + (f", {loader.alike.prefix} tokens that all begin with once in a row" if loader.alike else "")
        + (f", chosen for {len(loader.examples):,} examples" if not asked.data.batch_size else ""),
        **(_teacher(config) if program.method.distills else {}),
        "memory": _memory(config, asked, room, program),
        "steps": f"{steps} ({epochs:.2f} epochs), learning rate {learning_rate(config):g}, {config.schedule.name}",
    }


def _prompts(report: dict[str, int]) -> str:
    """The same of prompts."""
    bad = f", bad rows skipped {report['bad_rows']}" if report["bad_rows"] else ""
    return (
        f"{report['examples']:,} prompts, the longest of {report['longest']} tokens, dropped {report['dropped']}{bad}"
    )


def _rollouts(config: ConfigDict, loader: Loader) -> str:
    """What the model writes for a batch."""
    settings, rewards = config.rollouts, config.objective.rewards
    own = ENVIRONMENT if settings.environment else "score"
    names = [one if isinstance(one, str) else f"{one[1]:g} x {one[0]}" for one in rewards or (own,)]
    filters = "".join(
        f", {key} {settings[key]:g}"
        for key in ("top_k", "top_p", "min_p")
        if not configs.is_default(config, f"rollouts.{key}")
    )
    again = f", for {settings.iterations} steps" if settings.iterations > 1 else ""
    count = loader.batch_size * settings.samples
    part = f", of which {settings.learned} are learned from," if settings.learned else ""
    return (
        f"{count} completions that the model writes{again}: {settings.samples}{part} to each of "
        f"{loader.batch_size} prompts, of at most {settings.max_new_tokens} tokens, at temperature "
        f"{settings.temperature:g}{filters}; {_episodes(config)}rewarded by {' + '.join(names)}"
        + (f"; beside them {ptx_rows(config)} rows of config.data.ptx in each step" if config.data.ptx else "")
    )


def _episodes(config: ConfigDict) -> str:
    settings = config.rollouts
    named = [name for name in (settings.environment, *settings.tools) if name]
    if not named:
        return ""
    return f"in each at most {settings.turns} turns of so many, answered by {', '.join(named)}; "


def _teacher(config: ConfigDict) -> dict[str, str]:
    objective, settings = config.objective, config.rollouts
    written = f"{objective.student_share:.0%} of the steps from completions that the model writes, of at most "
    written += f"{settings.max_new_tokens} tokens, at temperature {settings.temperature:g}"
    model = objective.teacher + (f" with {objective.teacher_adapter}" if objective.teacher_adapter else "")
    return {"teacher": f"{model}; {written if objective.student_share else 'from the rows alone'}"}


def _examples(loader: Loader) -> str:
    """How many examples a batch has."""
    count = loader.batch_size * loader.examples.count / loader.rows_per_epoch(0)
    return f"{count:.0f} examples" if not loader.packing else f"about {count:.0f} examples"


def _memory(config: ConfigDict, asked: ConfigDict, room: float | None, program: Program) -> str:
    """What is done to fit the memory of a device, and whether that was chosen."""
    remat, count = config.model.remat, config.accumulate
    parts = ["nothing is computed twice" if remat == "none" else f"remat {remat}"]
    parts.append("the whole batch at once" if count == 1 else f"in {count} micro-batches")
    if asked.model.remat == "auto" or not asked.accumulate:
        size = f"about {memory.needed(program, remat, count) / memory.GIB:.1f} GiB"
        parts.append(f"chosen to fit: {size}" + (f" of {room / memory.GIB:.1f} a device" if room else " a device"))
    return ", ".join(parts)


def counted(report: dict[str, int]) -> str:
    """The report of `tokenize.tokenize` in words."""
    bad = f", bad rows skipped {report['bad_rows']}" if report["bad_rows"] else ""
    split = f" (each answer of {report['split']:,} rows is one)" if report["split"] else ""
    divided = ""
    if report["divided"]:
        divided = f"; {report['divided']:,} long texts go on in {report['further']:,} further documents"
    return (
        f"{report['examples']:,} examples{split}, {report['tokens']:,} tokens, {report['trained_tokens']:,} of them "
        f"trained; longest {report['longest']}, truncated {report['truncated']}, dropped {report['dropped']}{bad}"
        f"{divided}"
    )


def result(workdir: Path, standing: Standing, method: Method, format: str | None) -> dict[str, str]:
    """The results of a run of a method, and where they are. format: to take them out in; None: no format holds them."""
    evals = evaluations(metrics.read(workdir / "metrics.jsonl"))
    rows = {}
    names = [name for name in evals[-1] if name.startswith("eval_") and not is_category(name)] if evals else ()
    for name in names:
        first = next(record for record in evals if name in record)
        before = f"{first[name]:.4g} at step {first['step']} -> " if first is not evals[-1] else ""
        rows[name] = f"{before}{evals[-1][name]:.4g} at step {evals[-1]['step']}"
    quoted, python = shlex.quote(str(workdir)), shlex.quote(_python())
    rows |= {"checkpoints": str(workdir / "checkpoints") + _of_checkpoints(standing)}
    if (workdir / "samples.jsonl").exists():
        rows["completions"] = str(workdir / "samples.jsonl")
    use = f"{python} -m ftjax.generate --workdir {quoted} --prompt '...'" if method.generates else ""
    if method.rows == "ranked":
        use = f"{python} -m ftjax.score --reward {quoted} --data rows.jsonl --out scored.jsonl"
    take = f"{python} -m ftjax.export --workdir {quoted} --format {format}"
    return rows | {
        "metrics": f"{workdir / 'metrics.jsonl'}, and tensorboard --logdir {quoted}/tensorboard",
        **({"use it": use} if use else {}),
        **({"take it out": f"{take} --out {'ADAPTER' if format == 'peft' else 'MODEL'}"} if format else {}),
    }


def _python() -> str:
    """This interpreter, as a command to be typed here."""
    if shutil.which("python") == sys.executable:
        return "python"
    here = Path(sys.executable)
    return str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here)


def _of_checkpoints(standing: Standing) -> str:
    """Which of them generation and export use, and whether training was of use at all."""
    best, better = standing.best(), standing.better_unkept()
    if best is None:
        return ""
    latest = standing.kept[-1]
    parts = [f"the best is step {best}"]
    if latest != best:
        parts = [f"{parts[0]} ({standing.scored(best)})", f"the latest step {latest} ({standing.scored(latest)})"]
    return ", " + "; ".join(["; ".join(parts), *filter(None, [better, standing.incomparable()])])


def _new_tokens(config: ConfigDict, base: Base, trained: Tree) -> dict[str, str]:
    if not (config.model.add_tokens or config.model.resize_vocab):
        return {}
    tables = {path: leaf for path, leaf in tree.flatten(trained["params"]).items() if path in NEW_TOKENS}
    rows = base.model.spec.vocab_size - base.known_rows
    where = f"{rows} rows more, at first the mean of the others" if rows else "in spare rows of the embedding"
    size = sum(16 * leaf.size for leaf in tables.values())  # float32: weight, gradient and AdamW's two moments
    names = " and ".join(path.split("/")[0] for path in tables)
    return {"new tokens": f"{where}; {names} trained whole, {size / 1e6:,.1f} MB with gradients and moments"}


def _adapter(adapter: ConfigDict) -> str:
    if adapter.kind == "none":
        return f"none; trained are parameters matching {adapter.trainable!r}"
    kind = {"lora": "rsLoRA" if adapter.rslora else "LoRA", "dora": "DoRA"}[adapter.kind]
    notes = [
        "from " + adapter.source if adapter.source else "",
        "PiSSA" if adapter.init == "pissa" else "",
        f"dropout {adapter.dropout:g}" if adapter.dropout else "",
        f"in layers {adapter.layers}" if adapter.layers else "",
        "ranks and alphas by pattern" if adapter.rank_pattern or adapter.alpha_pattern else "",
        f"beside {', '.join(adapter.modules_to_save)} whole" if adapter.modules_to_save else "",
    ]
    what = f"{kind}, rank {adapter.rank}, alpha {adapter.alpha:g}, on {adapter.targets}"
    return ", ".join([what, *filter(None, notes)])


def _reference(config: ConfigDict, program: Program) -> dict[str, str]:
    found = []
    if config.objective.cache_reference:
        found.append("asked once, before the first step")
    if REFERENCE in program.frozen:
        found.append(f"the values that training starts from, {_size(program.frozen[REFERENCE])}")
    elif program.method.reference:
        found.append("the base, without its adapter")
    return {"reference": "; beside it ".join(found)} if found else {}


def _average(decay: float) -> str:
    return f"decay {decay:g}, of about the last {1 / (1 - decay):.0f} steps; what is evaluated and exported is this"


def _size(abstract: Tree, count: int | None = None) -> str:
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in tree.flatten(abstract).values())
    return f"{tree.count(abstract) if count is None else count:,} parameters, {size / 1e6:,.1f} MB"


def _multiplied(config: ConfigDict, asked: ConfigDict, mesh: Mesh) -> str:
    if config.model.matmul == "onednn":
        narrowed = ", kernels and adapters in bfloat16 where it generates" if onednn.operands() == "float32" else ""
        return f", multiplied in {onednn.operands()} by oneDNN{narrowed}"
    _, reason = onednn.choose(asked.model.matmul, sharding.platform(mesh), mesh.size)
    return f", multiplied by XLA: {reason}" if reason else ""


def _mesh(mesh: Mesh, base: Base, abstract: Tree) -> str:
    axes = params.logical_axes(base.model)
    shapes = {path: leaf.shape for path, leaf in tree.flatten(abstract).items()}
    whole = {note for path, shape in shapes.items() for note in sharding.undivided(axes[path], shape, mesh)}
    split = [f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1] or ["not split"]
    device = mesh.devices.flat[0].device_kind
    note = f"; left whole: {', '.join(sorted(whole))}" if whole else ""
    return f"{mesh.size} x {device}, {' x '.join(split)}{note}"
