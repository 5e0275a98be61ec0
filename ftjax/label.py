"""Ask people which of two answers is better, the most informative pairs first; training reads what they say.

    python -m ftjax.label --out labels --candidates FILE.jsonl            rows {"prompt", "answers": [...]}, or of pairs
    python -m ftjax.label --out labels --workdir runs/X                   the run's own answers to its training prompts
    python -m ftjax.label --out labels --workdir runs/X --prompts FILE    to other prompts
    python -m ftjax.label --out labels --model M --adapter A --prompts FILE --samples 4 --temperature 1
    python -m ftjax.label --out labels                                    goes on with what is there
    python -m ftjax.label --out labels --reward runs/reward               first what its heads disagree on
    python -m ftjax.label --out labels --terminal                         in the terminal instead of a page
    python -m ftjax.label --out labels --export                           only writes what has been said so far

It prints the address of a page on this machine, which works offline; Ctrl-C ends it. Several people may open it, each
under their own name; --overlap 0.1 shows a tenth of the pairs to all of them and measures how far they agree.

The directory --out has candidates.jsonl, the prompts and answers, made once; labels.jsonl, a line for each judgement as
soon as it is made; and preferences.jsonl, written at the end: the pairs with a preferred answer, by the majority where
several judged one. Train on it with --config.data.train=labels/preferences.jsonl --config.objective.name=dpo.
"""

import functools
import getpass
import secrets
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from ftjax import cli, distributed
from ftjax import config as configs
from ftjax.data.read.sources import absolute, read_sources
from ftjax.errors import UserError
from ftjax.inspection.terminal import console
from ftjax.labeling import candidates, journal, preferences, server, terminal
from ftjax.labeling.candidates import Candidates
from ftjax.labeling.disagreement import of_reward_model
from ftjax.labeling.order import order
from ftjax.labeling.pairs import Pair, pairs_of
from ftjax.labeling.session import Session, name_of
from ftjax.sampling.sampler import Sampling


class Options(NamedTuple):
    """What the flags say; see there."""

    out: str
    candidates: str | None = None
    workdir: str | None = None
    model: str | None = None
    adapter: str | None = None
    step: str | None = None
    prompts: str | None = None
    max_prompts: int = 200
    samples: int = 4
    temperature: float = 1.0
    max_new_tokens: int = 256
    batch_size: int = 16
    dtype: str = "float32"
    seed: int = 0
    reward: str | None = None
    question: str = "Which answer is better?"
    labeler: str | None = None
    overlap: float = 0.0
    terminal: bool = False
    port: int = 0
    export: bool = False


# What decides the candidates, and what else only goes with them.
_OF_SAMPLES = ("adapter", "step", "prompts", "max_prompts", "samples", "temperature", "max_new_tokens")
_WHILE_SAMPLING = ("batch_size", "dtype")


def label(options: Options, given: Collection[str]) -> int:
    """Labels as the options say; returns the exit status. given: the names of those that are on the command line."""
    _check(options, given)
    out, labeler = Path(options.out), name_of(options.labeler or _user())
    if not options.terminal and not options.export:
        server.import_library()
    made, kept = candidates.open_or_make(out, _source(options), lambda: _make(options))
    pairs = pairs_of(made)
    say = functools.partial(console().print, markup=False, soft_wrap=True)
    say(f"{len(pairs):,} pairs of answers to {len(made):,} prompts {'are' if kept else 'are now'} in {out}")
    if lone := sum(len(one.answers) < 2 for one in made):
        say(f"{lone:,} of the prompts have no two answers that differ, and are not asked about")
    with journal.opened(out, [pair.id for pair in pairs]) as labels:
        if labels.dropped:
            say(f"{out / journal.FILE}: its last line was unfinished and is dropped: {labels.dropped!r}")

        def exported() -> list[str]:
            return preferences.told(preferences.export(out, pairs, labels.labels), out)

        if not options.export:
            session = Session(_ranked(pairs, options, say), labels, options.overlap, options.seed)
            try:
                if options.terminal:
                    terminal.label(session, labeler, options.question, console())
                else:
                    _serve(session, options, labeler, exported, say)
            except KeyboardInterrupt:  # how it is meant to end
                say()
        for line in exported():
            say(line)
    return 0


def _ranked(pairs: Sequence[Pair], options: Options, say: Callable[[str], None]) -> list[Pair]:
    """The pairs in the order in which they are asked about."""
    if not options.reward:
        say("in random order; --reward RUN, an ensemble of reward heads, would put what it is unsure of first")
        return order(pairs, seed=options.seed)
    disagreement, heads = of_reward_model(options.reward)
    say(f"ranking {len(pairs):,} pairs: those on which the {heads} heads of {options.reward} disagree most come first")
    return order(pairs, disagreement, options.seed)


def _serve(
    session: Session,
    options: Options,
    labeler: str,
    exported: Callable[[], list[str]],
    say: Callable[[str], None],
) -> None:
    token = secrets.token_urlsafe(24)
    application = server.app(session, token, options.question, labeler, exported)
    with server.listen(options.port) as sock:
        port = sock.getsockname()[1]
        say(f"Open http://{server.HOST}:{port}/?token={token} and judge; Ctrl-C here ends it.")
        server.serve(application, sock)


def _check(options: Options, given: Collection[str]) -> None:
    """UserError for options that do nothing together, or are out of range."""

    def refuse(names: Iterable[str], why: str) -> None:
        if useless := next((name for name in names if name in given), None):
            raise UserError(f"--{useless}: {why}")

    sampling = options.workdir or options.model
    if options.candidates and sampling:
        raise UserError("give --candidates, or the --workdir or --model that makes them, but not both")
    if options.export:
        others = (
            "candidates",
            "workdir",
            "model",
            "terminal",
            "port",
            "overlap",
            "labeler",
            "question",
            "seed",
            "reward",
        )
        refuse(others, "--export only writes what has been said so far; leave one of them out")
    if options.terminal:
        refuse(["port"], "is of the page; leave it out, or --terminal")
    if not sampling:
        refuse((*_OF_SAMPLES, *_WHILE_SAMPLING), "goes with --workdir or --model, whose answers are compared")
    elif options.samples < 2 or not options.temperature > 0:
        raise UserError("--samples must be 2 or more and --temperature above 0: equal answers cannot be compared")
    if options.workdir:
        refuse(["dtype"], "goes with --model alone; a --workdir has the dtype of its config")
    elif options.model:
        refuse(["step"], "goes with --workdir")
        if not options.prompts:
            raise UserError("--model alone needs --prompts FILE: what it is to answer")
    if not 0 <= options.overlap <= 1:
        raise UserError(f"--overlap {options.overlap}: it is a share of the pairs, from 0 to 1")
    distributed.refuse_several("ftjax.label")


def _source(options: Options) -> dict[str, Any] | None:
    """What the candidates are made from, by which a later command is known to mean the same; None: not said."""
    if options.candidates:
        where = absolute(options.candidates)
        return {"candidates": where, "digest": read_sources([{"source": where}]).digest()}
    if not (options.workdir or options.model):
        return None
    found = {name: getattr(options, name) for name in ("workdir", "model", *_OF_SAMPLES, "seed")}
    for name in ("workdir", "prompts"):
        found[name] = found[name] and str(Path(found[name]).expanduser().absolute())
    return {name: value for name, value in found.items() if value is not None}


def _make(options: Options) -> list[Candidates]:
    if options.candidates:
        return candidates.of_file(options.candidates)
    # What follows imports for seconds, and a directory that is there already needs none of it.
    from ftjax import assemble, prompts
    from ftjax.adapted import load_model, parse_adapters
    from ftjax.evals import best
    from ftjax.labeling import samples
    from ftjax.method import check_generates
    from ftjax.training.display import Display

    asked = prompts.of_file(options.prompts) if options.prompts else None
    if options.workdir:
        workdir, moved = Path(options.workdir), {"model": options.model, "adapter": options.adapter}
        if asked is None:
            asked = samples.of_run(configs.read(workdir / "config.json"))
        step = best.choose(workdir, options.step)
        _, base, variables, _ = assemble.load_run(workdir, step, moved, check_generates)
    else:
        adapters = parse_adapters(options.adapter) if options.adapter else {}
        if len(adapters) > 1:
            raise UserError("--adapter: name one, whose answers are compared")
        base, by_name = load_model(options.model, adapters, options.dtype)
        variables = list(by_name.values())[-1]
    chosen = samples.some(asked, options.max_prompts)
    sampling = Sampling(options.temperature, seed=options.seed)
    with Display(1) as display:
        if len(chosen) < len(asked):
            display.say(f"{len(chosen):,} of {len(asked):,} prompts, evenly spread; --max_prompts=0 takes all")
        counts = options.samples, options.max_new_tokens
        return samples.draw(base, variables, chosen, *counts, sampling, options.batch_size, display)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user without a name, as in a container
        return "labeler"


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --")
    if not FLAGS.out:
        raise UserError("give --out DIR, the directory that keeps the candidates and what is said of them")
    values = {name: FLAGS[name].value for name in Options._fields}
    return label(Options(**values), [name for name in values if FLAGS[name].present])


if __name__ == "__main__":
    sys.argv[0] = "ftjax.label"  # absl shows in --help the flags defined under this name
    FLAGS = flags.FLAGS
    _DEFAULTS = Options(None)._asdict()

    def define(kind: Callable, name: str, what: str, **limits: float) -> None:
        kind(name, _DEFAULTS[name], what, **limits)

    define(flags.DEFINE_string, "out", "the directory of candidates, labels and preferences")
    define(flags.DEFINE_string, "candidates", "rows with a prompt and answers, or of preferences, in any format")
    define(
        flags.DEFINE_string, "workdir", "a run of ftjax.train that answers; --model, --adapter: where its own are now"
    )
    define(flags.DEFINE_string, "model", "a Hugging Face id, a directory, a .gguf file or package:NAME that answers")
    define(flags.DEFINE_string, "adapter", "a PEFT adapter's directory, for --model")
    define(flags.DEFINE_string, "step", "the run's checkpoint to use: best, latest or a number")
    define(flags.DEFINE_string, "prompts", "a file of prompts: .txt, one a line, or rows as training reads them")
    define(flags.DEFINE_integer, "max_prompts", "of the prompts, how many are used; 0: all", lower_bound=0)
    define(flags.DEFINE_integer, "samples", "answers to draw for each prompt")
    define(flags.DEFINE_float, "temperature", "of the answers")
    define(flags.DEFINE_integer, "max_new_tokens", "the most tokens of an answer", lower_bound=1)
    define(flags.DEFINE_integer, "batch_size", "how many answers are drawn together", lower_bound=1)
    flags.DEFINE_enum("dtype", _DEFAULTS["dtype"], configs.DTYPES, "of weights and computation, with --model alone")
    define(flags.DEFINE_integer, "seed", "of the answers, the order of pairs and which answer stands left")
    define(
        flags.DEFINE_string,
        "reward",
        "a run of objective.name=reward with an ensemble, or its export: what to ask first",
    )
    define(flags.DEFINE_string, "question", "what is asked of each pair")
    define(flags.DEFINE_string, "labeler", "your name (default: the user's)")
    define(flags.DEFINE_float, "overlap", "the share of the pairs that every labeler is shown")
    define(flags.DEFINE_boolean, "terminal", "label in the terminal instead of a page")
    define(flags.DEFINE_integer, "port", "of the page; 0: one that is free", lower_bound=0, upper_bound=65535)
    define(flags.DEFINE_boolean, "export", "only write preferences.jsonl and say how it stands")
    cli.run(main)
