"""Did it help? A run's model against what prompts can do with its base, on the same held-out examples.

    python -m ftjax.evaluate --workdir runs/quickstart                 the best checkpoint of a run, on its data.eval
    python -m ftjax.evaluate --config C --workdir W                    on what the config C evaluates on
    python -m ftjax.evaluate --workdir W --config.data.eval=o.jsonl    on other rows
    python -m ftjax.evaluate --workdir W --adapter o=DIR --model m=M   with adapters of its base, and whole models
    python -m ftjax.evaluate --workdir W --only base,tuned --limit 50  some of the contestants, on fewer examples

The contestants: the base as it is; with 1, 4, 8 and as many training examples in the prompt as fit (--shots), the same
ones for every question; with those nearest to each question (--retrieved); with another instruction, searched on
training examples (--instructions, --instruction_budget); and the tuned model without any. A table shows scores with
95 % intervals, valid answers, tokens and seconds, and with --price_in and --price_out costs; a verdict follows. What
the tuned model has forgotten is measured beside it, on general text (--abilities: more of it). With --judge_url and
--judge_model, a model says how often the tuned model's answers are better than the base's.

All of it is in WORKDIR/evaluation.json, which is written after each contestant: the same command goes on where it was
stopped, and what is there is not measured again. WORKDIR/report.html shows it.
"""

import contextlib
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from rich.table import Table

from ftjax import assemble, cli, config_changes, config_flag, distributed, interpolation, origin, prompts, tree
from ftjax import config as configs
from ftjax.adapted import NONE, load_model, parse_adapters
from ftjax.assemble import Base
from ftjax.errors import UserError, did_you_mean
from ftjax.evals import best, comparison, contestants, forgetting, general, heldout, rewrites, shots, verdict
from ftjax.evals.comparison import Contestant, Model, Record, Settings, digest_of
from ftjax.evals.heldout import LOSS, HeldOut
from ftjax.evals.judge import Judge, endpoint
from ftjax.evals.rewrites import Instruction
from ftjax.evals.scored import Question
from ftjax.method import check_generates
from ftjax.reporting import page
from ftjax.training.display import Display
from ftjax.tree import Tree
from ftjax.weights.load import load_params
from ftjax.weights.peft.adapter import base_digest, directory_digest

FORGETTING = "forgetting"


class Options(NamedTuple):
    """What is compared; see the flags.

    Attributes:
      only: kinds of contestants, or names of adapters and models; (): all.
      shots, retrieved: numbers of examples; "fit" is as many as fit.
      max_prompt_tokens: of prompts with examples.
      instructions: what is tried as another instruction; (): some that are generic.
      adapters, models: {name: where it is}.
      abilities: of what was forgotten also what takes longer: multiple choice, instructions, drift of the weights.
      judge: says how often the tuned model's answers are better than the base's.
    """

    step: str | None = None
    limit: int = 200
    only: tuple[str, ...] = ()
    shots: tuple[int | str, ...] = (1, 4, 8, "fit")
    retrieved: tuple[int | str, ...] = (8,)
    max_prompt_tokens: int = 4096
    instructions: tuple[Instruction, ...] = ()
    instruction_budget: int = 48
    adapters: Mapping[str, str] = MappingProxyType({})
    models: Mapping[str, str] = MappingProxyType({})
    abilities: bool = False
    price_in: float | None = None
    price_out: float | None = None
    judge: Judge | None = None


def evaluate(workdir: Path, options: Options, given: ConfigDict | None = None) -> dict:
    """Compares the run in `workdir` with its base and others; returns what is then in its evaluation.json.

    given: a config whose `data.eval` and `evaluate` are used instead of the run's own.

    Raises:
      UserError: no run, another config than the run's, nothing to compare on, an unknown contestant.
    """
    named = {**options.adapters, **options.models}
    known = [*comparison.KINDS[:-1], FORGETTING, *named]
    if unknown := next((name for name in options.only if name not in known), None):
        raise UserError(f"--only: there is no contestant {unknown!r}{did_you_mean(unknown, known)}")
    wanted = options.only or known
    evaluated = _evaluated(configs.read(workdir / "config.json"), given)
    chosen = best.choose(workdir, options.step)
    config, base, variables, step = assemble.load_run(workdir, chosen, check=check_generates)
    config = configs.changed(config, evaluated)
    with Display(1) as display:
        # The examples.
        sets = heldout.held_out(config, base, options.limit, display)
        if not sets:
            raise UserError(
                "there is nothing to compare on: config.data.eval has no rows that are answered or have a loss that "
                "compares; name some with --config.data.eval, pairs with the option 'score'"
            )
        training = shots.training_questions(config, [question for held in sets for question in held.questions])
        sets = [heldout.with_form(held, training) for held in sets]
        settings = Settings.of(config, options.price_in, options.price_out)

        # What is known of an earlier evaluation.
        digest = digest_of([origin.contents(config, base.reader, base.model.spec), config.quantize.base])
        tuned = Model(base, variables, digest_of([digest, step, _checkpoint(workdir, step)]))
        record = Record(workdir / comparison.FILE, step, config.model.source)
        record.drop_others({"base": digest, "tuned": tuned.digest})
        for held in sets:
            for its in record.set_of(held, settings)["contestants"]:
                comparison.grade(its, held)

        def run(contestant: Contestant, held: HeldOut, model: Model) -> None:
            comparison.run(contestant, held, model, settings, record, display)

        def unprompted(model: Model, name: str, kind: str) -> None:
            for held in sets:
                run(Contestant(name, kind, [question.prompt for question in held.questions]), held, model)

        # The contestants, the tuned model first: its memory is then free for the base, where all of it was trained.
        if "tuned" in wanted:
            unprompted(tuned, "tuned", "tuned")
        if FORGETTING in wanted:
            _forgotten(config, sets, tuned, options.abilities, record, display)
        prompted = set(verdict.PROMPTS) & set(wanted)
        if prompted:
            model = Model(base, base_variables(config, base, variables), digest)
            if "base" in wanted:
                unprompted(model, "base", "base")
            for held in sets if prompted != {"base"} else ():
                if held.metric != LOSS:
                    for contestant in _prompted(held, training, model, wanted, options, settings, record, display):
                        run(contestant, held, model)
            del model
        del tuned, variables
        for name in named:
            if name in wanted:
                unprompted(_other(name, options, config, base, sets), name, "other")

        # What it says.
        for held in sets:
            entry = record.set_of(held, settings)
            comparison.summarize(entry, held, settings)
            if options.judge and (preferred := comparison.judge(entry, held, options.judge)):
                display.say(preferred)
        record.document["verdict"] = verdict.overall({its["name"]: its["verdict"] for its in record.document["sets"]})
        record.write()
        _say(record.document, workdir, display)
    return record.document


def _say(document: dict, workdir: Path, display: Display) -> None:
    """The tables and the verdicts, on the terminal and in the run's report."""
    for entry in document["sets"]:
        display.console.print(_table(entry))
    forgotten = document.get(FORGETTING, {}).get("verdict")
    for text in (document["verdict"], forgotten, f"All of it is in {workdir / comparison.FILE}"):
        if text:
            display.say(text)
    page.write([workdir], workdir / page.FILE)
    display.say(f"as a page: {workdir / page.FILE}")


def _evaluated(recorded: ConfigDict, given: ConfigDict | None) -> dict[str, Any]:
    """{dotted key: value} of what a config says about evaluation; UserError where it is that of another run."""
    if given is None:
        return {}
    configs.validate(given)
    if other := config_changes.changes(recorded, configs.with_recorded(given, recorded)):
        raise UserError(
            f"--config is not that of the run: {', '.join(other)}; only its data.eval and evaluate may differ "
            "(the run's own config is config.json in its --workdir)"
        )
    if given.evaluate.best not in ("", recorded.evaluate.best):
        raise UserError(
            f"config.evaluate.best={given.evaluate.best!r}: which checkpoint is the best was decided in training, by "
            f"{recorded.evaluate.best or 'the first score, or the held-out loss'}; name another checkpoint with --step"
        )
    return {key: value for key, value in configs.flat(given).items() if key.startswith(("data.eval", "evaluate."))}


def _checkpoint(workdir: Path, step: int) -> str:
    """The digests that a checkpoint brings; "" of an older one."""
    path = workdir / "checkpoints" / str(step) / "digests.json"
    return path.read_text() if path.is_file() else ""


def base_variables(config: ConfigDict, base: Base, variables: Tree) -> Tree:
    """The base of a run, with the arrays of its `variables` that training has not changed; the others are read again.

    `variables` is emptied, so that both need not be there at once.
    """
    mesh = jax.tree.leaves(variables)[0].sharding.mesh
    params, packed = tree.flatten(variables.pop("params")), variables.pop("quant", None)
    variables.clear()
    with jax.set_mesh(mesh):
        abstract, is_trained = assemble.abstract_variables(config, base.model, mesh)
        changed = {path: params.pop(path) for path in interpolation.changed(tree.flatten(abstract), is_trained)}
        dtype = jnp.dtype(config.model.param_dtype)
        wanted = {p: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding) for p, x in changed.items()}
        del changed
        if wanted:
            params |= tree.flatten(load_params(base.reader, base.model.spec, tree.unflatten(wanted)))
    return {"params": tree.unflatten(params)} | ({"quant": packed} if packed else {})


def _prompted(
    held: HeldOut,
    training: Sequence[Question],
    base: Model,
    wanted: Sequence[str],
    options: Options,
    settings: Settings,
    record: Record,
    display: Display,
) -> Iterator[Contestant]:
    """What prompts can do with the base, on one set."""
    if not training:
        display.say(f"{held.name}: no prompts with examples: no training row is a question with an answer")
        return
    if "instruction" in wanted and options.instruction_budget:
        searches = record.set_of(held, settings)["searches"]
        its = options.instructions, options.instruction_budget, searches, settings, display
        if found := contestants.with_instruction(held, training, base, *its):
            yield found
    room = base.base.model.spec.max_position_embeddings - settings.max_new_tokens
    limit = min(options.max_prompt_tokens, room)
    for kind, numbers in {"shots": options.shots, "retrieved": options.retrieved}.items():
        for k in numbers if kind in wanted else ():
            if found := contestants.with_shots(held, training, base.base, k, limit, kind == "retrieved", display):
                yield found


def _forgotten(
    config: ConfigDict, sets: Sequence[HeldOut], tuned: Model, abilities: bool, record: Record, display: Display
) -> None:
    """Records what the tuned model has forgotten, where that is not there yet, of config.evaluate.general."""
    base, positions = tuned.base, tuned.base.model.spec.max_position_embeddings
    if not (entries := configs.general_sources(config)):
        display.say("what was forgotten is not measured: config.evaluate.general is empty ('general' is what ships)")
        return
    texts = general.read(entries, base.tokenizer, positions)
    every = [question.prompt for held in sets for question in held.questions]
    asked = [prompts.tokens(prompt, base.tokenizer, rules=base.images) for prompt in every]
    asked = [its for its in asked if isinstance(its, np.ndarray)]  # of text alone, as what is measured beside them
    of = [tuned.digest, abilities, [its.tolist() for its in asked], [[*map(int, text.item[1])] for text in texts]]
    if record.document.get(FORGETTING, {}).get("digest") == digest_of(of):
        return
    with contextlib.ExitStack() as bar, jax.set_mesh(jax.tree.leaves(tuned.variables)[0].sharding.mesh):
        shown, advance = "", None

        def on_progress(what: str, done: int, total: int) -> None:
            nonlocal shown, advance
            if what != shown:
                bar.close()
                shown, advance = what, bar.enter_context(display.counter(what, total))
                display.say(what)
            advance(done)

        reference = forgetting.reference_of(config, base, tuned.variables)
        found = forgetting.forgetting(
            base, tuned.variables, reference, texts, asked, (), abilities, abilities, on_progress
        )
    record.document[FORGETTING] = found | {"digest": digest_of(of), "model": tuned.digest}
    record.write()


def _other(name: str, options: Options, config: ConfigDict, own: Base, sets: Sequence[HeldOut]) -> Model:
    """An adapter of the run's base, whose images are those of the run, or a whole model, with its own settings.

    own: the base of the run. A whole model must see where one of the `sets` has images.
    """
    if name in options.adapters:
        path = options.adapters[name]
        base, variables = load_model(config.model.source, {name: path}, config.model.dtype, vision=config.model.vision)
        base = base._replace(images=own.images)
        digest = digest_of([directory_digest(Path(path).expanduser()), base_digest(base.reader, base.model.spec)])
        return Model(base, variables[name], digest)
    sees = any(question.prompt.has_images for held in sets for question in held.questions)
    base, variables = load_model(options.models[name], {}, config.model.dtype, vision=sees)
    digest = base_digest(base.reader, base.model.spec)
    return Model(base, variables[NONE], digest, config.data.system, same_tokens=False)


def _table(entry: dict) -> Table:
    """The contestants of a set, as a person reads them."""
    title = f"{entry['name']}: {entry['metric']} on {entry['examples']:,} examples"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1), header_style="bold")
    table.add_column("", no_wrap=True)
    names = ("95 %", "valid", "prompt tokens", "answer tokens", "s/answer", "at once", "cost/1,000")
    for name in (entry["metric"], *names):
        table.add_column(name, justify="right")
    for its in entry["contestants"]:
        value = its["loss"] if entry["metric"] == LOSS else its["score"]
        table.add_row(
            its["name"],
            *(_cell(value, ".3f"), comparison.between(its["interval"]).strip(), _cell(its["valid"], ".0%")),
            *(_cell(its["prompt_tokens"], ",.0f"), _cell(its["generated_tokens"], ",.0f")),
            *(_cell(its["seconds"], ".2f"), _cell(its.get("batch_size"), "d"), _cell(its["cost"], ",.2f")),
            style="bold" if its["kind"] == "tuned" else None,
        )
    return table


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _numbers(flag: str, text: str) -> tuple[int | str, ...]:
    """The value of --shots or --retrieved: "1,4,8,fit"."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if wrong := [part for part in parts if part != "fit" and not (part.isdecimal() and int(part))]:
        raise UserError(f"--{flag}={text}: {wrong[0]!r} is neither a number from 1 nor fit")
    if flag == "retrieved" and "fit" in parts:
        raise UserError("--retrieved: fit is for --shots; give a number of examples")
    return tuple(sorted({part if part == "fit" else int(part) for part in parts}, key=lambda k: (k == "fit", k)))


def _models(texts: Sequence[str], taken: Collection[str]) -> dict[str, str]:
    """{name: model} of "name=M" or "M", which is its own name."""
    found: dict[str, str] = {}
    for text in texts:
        name, _, source = text.partition("=")
        if name in {*found, *taken}:
            raise UserError(f"--model: the name {name!r} is taken; give another one, NAME=MODEL")
        found[name] = source or name
    return found


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --")
    if not (FLAGS.workdir or FLAGS.config):
        raise UserError("give --workdir, the run that is evaluated (and --config for other rows to evaluate it on)")
    if (FLAGS.price_in is None) != (FLAGS.price_out is None):
        raise UserError("--price_in and --price_out go together: what a million tokens of each cost")
    if (FLAGS.judge_url is None) != (FLAGS.judge_model is None):
        raise UserError("--judge_url and --judge_model go together: an OpenAI-compatible endpoint, and a model there")
    distributed.refuse_several("ftjax.evaluate")
    workdir = Path(FLAGS.workdir or f"runs/{config_flag.name()}")
    if not FLAGS.config:  # also for --config.KEY=VALUE alone
        configs.read(workdir / "config.json")  # for its errors
        FLAGS.config = str(workdir / "config.json")
    adapters = parse_adapters(",".join(FLAGS.adapter)) if FLAGS.adapter else {}
    for name, path in adapters.items():
        if name in {*comparison.KINDS, FORGETTING}:
            raise UserError(f"--adapter: {name!r} is the name of another contestant; give it another one, NAME=DIR")
        if not (Path(path).expanduser() / "adapter_config.json").is_file():
            raise UserError(f"--adapter {name}: {path} holds no adapter_config.json; give the directory of an adapter")
    options = Options(
        step=FLAGS.step,
        limit=FLAGS.limit,
        only=tuple(FLAGS.only or ()),
        shots=_numbers("shots", FLAGS.shots),
        retrieved=_numbers("retrieved", FLAGS.retrieved),
        max_prompt_tokens=FLAGS.max_prompt_tokens,
        instructions=tuple(rewrites.of_file(Path(FLAGS.instructions))) if FLAGS.instructions else (),
        instruction_budget=FLAGS.instruction_budget,
        adapters=adapters,
        models=_models(FLAGS.model, {*comparison.KINDS, FORGETTING, *adapters}),
        abilities=FLAGS.abilities,
        price_in=FLAGS.price_in,
        price_out=FLAGS.price_out,
        judge=endpoint(FLAGS.judge_url, FLAGS.judge_model, key=FLAGS.judge_key) if FLAGS.judge_url else None,
    )
    evaluate(workdir, options, config_flag.value())
    return 0


if __name__ == "__main__":
    sys.argv[0] = "ftjax.evaluate"  # absl shows in --help the flags defined under this name
    FLAGS = flags.FLAGS
    config_flag.define()
    flags.DEFINE_string("workdir", None, "the run (default: runs/NAME-OF-THE-CONFIG)")
    flags.DEFINE_string("step", None, best.STEP_HELP)
    flags.DEFINE_integer("limit", 200, "examples of each set, drawn from one seed; 0: all", lower_bound=0)
    kinds = ", ".join((*comparison.KINDS[:-1], FORGETTING))
    flags.DEFINE_list("only", None, f"of {kinds}, and names of adapters and models")
    flags.DEFINE_string("shots", "1,4,8,fit", "numbers of training examples in the prompt; fit: as many as fit")
    flags.DEFINE_string("retrieved", "8", "numbers of training examples that are the nearest of each question")
    flags.DEFINE_integer("max_prompt_tokens", 4096, "of prompts with examples; the model's positions at most")
    flags.DEFINE_string("instructions", None, "a file of instructions to try, one a line; {system}: the prompt's own")
    flags.DEFINE_integer("instruction_budget", 48, "answers that the search of an instruction may cost; 0: none")
    flags.DEFINE_multi_string("adapter", None, "name=DIR: another PEFT adapter of the run's base")
    flags.DEFINE_multi_string("model", [], "name=M: a whole model: a Hugging Face id, a directory, a .gguf, package:X")
    flags.DEFINE_boolean("abilities", False, "what was forgotten also by multiple choice, instructions, and layers")
    flags.DEFINE_float("price_in", None, "what a million prompt tokens cost", lower_bound=0)
    flags.DEFINE_float("price_out", None, "what a million generated tokens cost", lower_bound=0)
    flags.DEFINE_string("judge_url", None, "an OpenAI-compatible endpoint that compares answers, up to and with /v1")
    flags.DEFINE_string("judge_model", None, "the model there")
    flags.DEFINE_string("judge_key", "OPENAI_API_KEY", "the environment variable with its key; empty: it wants none")
    cli.run(main, config_flag.parse)
