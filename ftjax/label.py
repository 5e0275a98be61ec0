"""Ask people which of two answers is better, the most informative pairs first; training reads what they say.

    python -m ftjax.label --out labels --candidates FILE.jsonl            rows {"prompt", "answers": [...]}, or of pairs
    python -m ftjax.label --out labels --workdir runs/X                   the run's own answers to its training prompts
    python -m ftjax.label --out labels --workdir runs/X --prompts FILE    to other prompts
    python -m ftjax.label --out labels --model M --adapter A --prompts FILE --samples 4 --temperature 1
    python -m ftjax.label --out labels                                    goes on with what is there
    python -m ftjax.label --out labels --terminal                         in the terminal instead of a page
    python -m ftjax.label --out labels --export                           only writes what has been said so far

It prints the address of a page on this machine, which works offline; Ctrl-C ends it. Several people may open it, each
under their own name; --overlap 0.1 shows a tenth of the pairs to all of them and measures how far they agree.

The directory --out has candidates.jsonl, the prompts and answers, made once; labels.jsonl, a line for each judgement as
soon as it is made; and preferences.jsonl, written at the end: the pairs with a preferred answer, by the majority where
several judged one. Train on it with --config.data.train=labels/preferences.jsonl --config.objective.name=dpo.
"""

import getpass
import secrets
import sys
from pathlib import Path
from typing import Any

from absl import flags

from ftjax import cli, distributed
from ftjax import config as configs
from ftjax.data.read.sources import absolute, read_sources
from ftjax.errors import UserError
from ftjax.inspection.terminal import console
from ftjax.labeling import candidates, journal, preferences, server, terminal
from ftjax.labeling.candidates import Candidates
from ftjax.labeling.order import order
from ftjax.labeling.pairs import pairs_of
from ftjax.labeling.session import Session, name_of
from ftjax.sampling.sampler import Sampling

QUESTION = "Which answer is better?"


def label(options: dict[str, Any], given: set[str]) -> int:
    """Labels as the flags say; returns the exit status.

    options: the flags by name; given: those that were on the command line.
    """
    _check(options, given)
    out, who = Path(options["out"]), name_of(options["labeler"] or _user())
    if not options["terminal"] and not options["export"]:
        server.import_library()
    made, kept = candidates.open_or_make(out, _source(options), lambda: _make(options))
    pairs = pairs_of(made)
    say = console().print
    say(
        f"{len(pairs):,} pairs of answers to {len(made):,} prompts {'are' if kept else 'are now'} in {out}",
        markup=False,
    )
    if lone := sum(len(one.answers) < 2 for one in made):
        say(f"{lone:,} of the prompts have no two answers that differ, and are not asked about", markup=False)
    with journal.opened(out, [pair.id for pair in pairs]) as kept_labels:
        if kept_labels.dropped:
            say(
                f"{out / journal.FILE}: its last line was unfinished and is dropped: {kept_labels.dropped!r}",
                markup=False,
            )
        try:
            if not options["export"]:
                say("in random order: there is no ensemble of reward models to say which pairs tell most", markup=False)
                session = Session(order(pairs, seed=options["seed"]), kept_labels, options["overlap"], options["seed"])

                def finished() -> list[str]:
                    return preferences.told(preferences.export(out, pairs, kept_labels.labels), out)

                if options["terminal"]:
                    terminal.label(session, who, options["question"], console())
                else:
                    _serve(session, options, who, finished, say)
        except KeyboardInterrupt:  # how it is meant to end
            say()
        for line in preferences.told(preferences.export(out, pairs, kept_labels.labels), out):
            say(line, markup=False)
    return 0


def _serve(session: Session, options: dict[str, Any], who: str, finished, say) -> None:
    token = secrets.token_urlsafe(24)
    application = server.app(session, token, options["question"], who, finished)
    with server.listen(options["port"]) as sock:
        port = sock.getsockname()[1]
        say(
            f"Open http://{server.HOST}:{port}/?token={token} and judge; Ctrl-C here ends it.",
            markup=False,
            soft_wrap=True,
        )
        server.serve(application, sock)


_SAMPLED = (
    "adapter",
    "prompts",
    "step",
    "samples",
    "temperature",
    "max_new_tokens",
    "batch_size",
    "max_prompts",
    "dtype",
)


def _check(options: dict[str, Any], given: set[str]) -> None:
    """UserError for flags that do nothing together, or are out of range."""
    if options["candidates"] and (options["workdir"] or options["model"]):
        raise UserError("give --candidates, or the --workdir or --model that makes them, but not both")
    if not (options["workdir"] or options["model"]):
        if useless := next((name for name in _SAMPLED if name in given), None):
            raise UserError(f"--{useless} goes with --workdir or --model, whose answers are compared")
    elif options["samples"] < 2 or not options["temperature"] > 0:
        raise UserError(
            "--samples must be 2 or more, and --temperature above 0: answers that are alike cannot be compared"
        )
    if options["model"] and not options["workdir"] and not options["prompts"]:
        raise UserError("--model alone needs --prompts FILE: what it is to answer")
    if options["workdir"] and "dtype" in given:
        raise UserError("--dtype goes with --model alone; a --workdir has the dtype of its config")
    if not options["workdir"] and "step" in given:
        raise UserError("--step goes with --workdir")
    if not 0 <= options["overlap"] <= 1:
        raise UserError(f"--overlap {options['overlap']}: it is a share of the pairs, from 0 to 1")
    if options["terminal"] and "port" in given:
        raise UserError("--port goes with the page; leave out --terminal or --port")
    if options["export"]:
        asked = ("terminal", "port", "overlap", "labeler", "question", "seed", "candidates", "workdir", "model")
        if useless := next((name for name in asked if name in given), None):
            raise UserError(f"--export only writes what has been said so far; leave out --{useless}")
    distributed.refuse_several("ftjax.label")


def _source(options: dict[str, Any]) -> dict[str, Any] | None:
    """What the candidates are made from, by which a later command is known to mean the same; None: not said."""
    if options["candidates"]:
        where = absolute(options["candidates"])
        return {"candidates": where, "digest": read_sources([{"source": where}]).digest()}
    if not (options["workdir"] or options["model"]):
        return None
    names = (
        "workdir",
        "model",
        "adapter",
        "step",
        "prompts",
        "max_prompts",
        "samples",
        "temperature",
        "max_new_tokens",
    )
    found = {name: options[name] for name in (*names, "seed") if options[name] is not None}
    for name in ("workdir", "prompts"):
        if name in found:
            found[name] = str(Path(found[name]).expanduser().absolute())
    return found


def _make(options: dict[str, Any]) -> list[Candidates]:
    if options["candidates"]:
        return candidates.of_file(options["candidates"])
    # What follows imports for seconds, and a directory that is there already needs none of it.
    from ftjax import assemble, prompts
    from ftjax.adapted import load_model, parse_adapters
    from ftjax.evals import best
    from ftjax.labeling import samples
    from ftjax.training.display import Display

    asked = prompts.of_file(options["prompts"]) if options["prompts"] else None
    if options["workdir"]:
        workdir, moved = Path(options["workdir"]), {"model": options["model"], "adapter": options["adapter"]}
        if asked is None:
            asked = samples.of_run(configs.read(workdir / "config.json"))
        _, base, variables, _ = assemble.load_run(workdir, best.choose(workdir, options["step"]), moved)
    else:
        adapters = parse_adapters(options["adapter"]) if options["adapter"] else {}
        if len(adapters) > 1:
            raise UserError("--adapter: name one")
        base, by_name = load_model(options["model"], adapters, options["dtype"])
        variables = list(by_name.values())[-1]
    sampling = Sampling(options["temperature"], seed=options["seed"])
    with Display(1) as display:
        chosen = samples.some(asked, options["max_prompts"])
        if len(chosen) < len(asked):
            display.say(f"{len(chosen):,} of {len(asked):,} prompts, evenly spread; --max_prompts=0 takes all")
        counts = options["samples"], options["max_new_tokens"]
        return samples.draw(base, variables, chosen, *counts, sampling, options["batch_size"], display)


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
    return label({name: FLAGS[name].value for name in _OPTIONS}, {name for name in _OPTIONS if FLAGS[name].present})


if __name__ == "__main__":
    sys.argv[0] = "ftjax.label"  # absl shows in --help the flags defined under this name
    FLAGS = flags.FLAGS
    before = set(FLAGS)
    flags.DEFINE_string("out", None, "the directory of candidates, labels and preferences")
    flags.DEFINE_string("candidates", None, "rows with a prompt and answers, or of preferences, in any format")
    flags.DEFINE_string(
        "workdir", None, "a run of ftjax.train whose answers are compared; --model, --adapter: as there"
    )
    flags.DEFINE_string(
        "model", None, "a Hugging Face id, a directory, a .gguf file or package:NAME, to answer --prompts"
    )
    flags.DEFINE_string("adapter", None, "a PEFT adapter's directory, for --model")
    flags.DEFINE_string("step", None, "the run's checkpoint to use: best, latest or a number")
    flags.DEFINE_string("prompts", None, "a file of prompts: .txt, one a line, or rows as training reads them")
    flags.DEFINE_integer("max_prompts", 200, "of the prompts, how many are used; 0: all", lower_bound=0)
    flags.DEFINE_integer("samples", 4, "answers to draw for each prompt")
    flags.DEFINE_float("temperature", 1.0, "of the answers")
    flags.DEFINE_integer("max_new_tokens", 256, "the most tokens of an answer", lower_bound=1)
    flags.DEFINE_integer("batch_size", 16, "how many answers are drawn together", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", configs.DTYPES, "dtype of weights and computation, with --model alone")
    flags.DEFINE_integer("seed", 0, "of the answers, the order of pairs and which answer stands left")
    flags.DEFINE_string("question", QUESTION, "what is asked of each pair")
    flags.DEFINE_string("labeler", None, "your name (default: the user's)")
    flags.DEFINE_float("overlap", 0.0, "the share of the pairs that every labeler is shown")
    flags.DEFINE_boolean("terminal", False, "label in the terminal instead of a page")
    flags.DEFINE_integer("port", 0, "of the page; 0: one that is free", lower_bound=0, upper_bound=65535)
    flags.DEFINE_boolean("export", False, "only write preferences.jsonl and say how it stands")
    _OPTIONS = sorted(set(FLAGS) - before)
    cli.run(main)
