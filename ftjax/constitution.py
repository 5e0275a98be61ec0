"""A model that critiques and revises its own answers, and prefers some of them, by principles of a file.

    python -m ftjax.constitution --show                           the principles that ship; --show FILE checks yours
    python -m ftjax.constitution revise --model M --prompts prompts.txt --out runs/cai/revised
    python -m ftjax.train --config chat --config.model.source=M --config.data.train=runs/cai/revised/sft.jsonl \\
        --workdir runs/cai/sft
    python -m ftjax.constitution compare --workdir runs/cai/sft --critic M --prompts prompts.txt --out runs/cai/compared
    python -m ftjax.train --config dpo ... --config.data.train=runs/cai/compared/preferences.jsonl

These are the two phases of Constitutional AI (Bai et al. 2022, arXiv 2212.08073). `revise` lets the model answer each
prompt, say how the answer breaks a principle that is drawn for it, and rewrite it; training learns the last revision.
`compare` lets the tuned model answer twice, and a critic say which answer keeps drawn principles better; DPO or a
reward model learns that. docs/constitution.md says more. A command that was stopped goes on when it is given again.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ftjax import cli, distributed
from ftjax import config as configs
from ftjax.atomic import write_rows
from ftjax.constitutional import journal, principles
from ftjax.errors import UserError

_DTYPE = "float32"

Block = Callable[[Sequence[Any], int], list[dict]]  # prompts, the number of the first -> their rows
Models = Callable[[], tuple[Any, Any]]  # () -> (model, critic), each `constitutional.models.Asked`


def revise(args: argparse.Namespace, models: Models | None = None) -> None:
    """The first phase. models: for tests; else those that the arguments name."""
    from ftjax.constitutional import revising

    how = revising.Revising(*_read(args), *(getattr(args, name) for name in revising.Revising._fields[2:]))

    def block(asked: Sequence[Any], first: int) -> list[dict]:
        return revising.revise(asked, first, *opened(), how)

    opened = _once(models or (lambda: _models(args)))
    chains = _rows(args, how, revising.CHAINS, block)
    _write(args.out / revising.SFT, revising.trained(chains))
    _say(revising.told(chains, args.out, args.max_new_tokens))


def compare(args: argparse.Namespace, models: Models | None = None) -> None:
    """The second phase."""
    from ftjax.constitutional import comparing

    if not args.temperature > 0:
        raise UserError("--temperature must be above 0: two equal answers cannot be compared")
    how = comparing.Comparing(*_read(args), *(getattr(args, name) for name in comparing.Comparing._fields[2:]))
    if how.principles > len(how.constitution):
        raise UserError(f"--principles {how.principles}: the constitution has {len(how.constitution)}; lower it")
    if args.critic_temperature and not how.think:
        raise UserError("--critic_temperature goes with --think: nothing else is drawn from the critic")

    def block(asked: Sequence[Any], first: int) -> list[dict]:
        return comparing.compare(asked, first, *opened(), how)

    opened = _once(models or (lambda: _models(args)))
    rows = _rows(args, how, comparing.COMPARISONS, block)
    _write(args.out / comparing.PREFERENCES, comparing.preferences(rows, args.least))
    _say(comparing.told(rows, args.out, args.least, args.max_new_tokens))


def _read(args: argparse.Namespace) -> tuple[list[principles.Principle], list[principles.Example]]:
    constitution = principles.read(args.constitution or principles.SHIPPED)
    if not args.shots:
        if args.examples:
            raise UserError("--examples: --shots 0 shows none of them; leave one of the two out")
        return constitution, []
    if args.examples or not args.constitution:
        return constitution, principles.read_examples(args.examples or principles.SHIPPED_EXAMPLES, constitution)
    raise UserError(
        f"--constitution {args.constitution}: needs --examples FILE, critiques and revisions by its principles (see "
        f"{principles.SHIPPED_EXAMPLES}), which small models cannot do without; --shots 0 shows none"
    )


def _rows(args: argparse.Namespace, how: Any, file: str, block: Block) -> list[dict]:
    """The rows of all prompts: those of an earlier start, and then those that are missing, a block at a time."""
    from ftjax import prompts
    from ftjax.labeling.samples import some
    from ftjax.training.display import Display

    distributed.refuse_several("ftjax.constitution")
    every = prompts.of_file(args.prompts)
    asked = some(every, args.max_prompts)
    size, name = args.batch_size, args.command
    with (
        Display(1) as display,
        journal.opened(args.out, file, _settings(args, how, asked), size, len(asked)) as kept,
        display.counter(name, len(asked)) as advance,
    ):
        if len(asked) < len(every):
            display.say(f"{len(asked):,} of {len(every):,} prompts; --max_prompts 0 takes all that differ")
        if kept.rows:
            display.say(f"{len(kept.rows):,} of {len(asked):,} prompts are done already in {args.out}")
        while len(kept.rows) < len(asked):
            first = len(kept.rows)
            kept.add(block(asked[first : first + size], first))
            advance(len(kept.rows))
            if not display.console.is_terminal:
                display.say(f"{name}: {len(kept.rows):,} of {len(asked):,} prompts")
        return kept.rows


def _settings(args: argparse.Namespace, how: Any, asked: Sequence[Any]) -> dict[str, Any]:
    """What rows follow from, in a form that JSON keeps."""

    def digest(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:16]

    named = ("model", "adapter", "workdir", "step", "critic", "critic_adapter", "critic_url")
    found = {name: _place(getattr(args, name)) for name in named} | {"dtype": args.dtype or _DTYPE}
    found |= {name: value for name, value in how._asdict().items() if name not in ("constitution", "examples")}
    return {"command": args.command} | {
        **{name: value for name, value in found.items() if value is not None},
        "what --prompts holds": digest([prompt.fields for prompt in asked]),
        "what --constitution holds": digest(how.constitution),
        "what --examples holds": digest(how.examples),
    }


def _place(name: str | None) -> str | None:
    """A name that means the same from every directory."""
    there = name is not None and Path(name).expanduser().exists()
    return str(Path(name).expanduser().absolute()) if there else name


def _models(args: argparse.Namespace) -> tuple[Any, Any]:
    """Who answers and who judges; both may be the same, or share a base."""
    # What follows imports for seconds, and what is there already needs none of it.
    from ftjax import assemble
    from ftjax.adapted import NONE, load_model
    from ftjax.constitutional import models
    from ftjax.method import check_generates

    adapters = {"answers": args.adapter} if args.adapter else {}
    if args.workdir:
        workdir = Path(args.workdir)
        _, base, variables, _ = assemble.load_run(workdir, int(args.step), {}, check_generates)
    else:
        shared = args.critic_adapter not in (None, NONE) and not args.critic
        by_critic = {"critic": args.critic_adapter} if shared else {}
        base, by_name = load_model(args.model, adapters | by_critic, args.dtype or _DTYPE)
        variables = by_name["answers" if args.adapter else NONE]
    model = models.local(base, variables, args.batch_size)
    if args.critic_url:
        key = {} if args.critic_key is None else {"key": args.critic_key}
        return model, models.endpoint(args.critic_url, args.critic, **key)
    if args.critic:
        given = {"critic": args.critic_adapter} if args.critic_adapter else {}
        other, by_name = load_model(args.critic, given, args.dtype or _DTYPE)
        return model, models.local(other, by_name["critic" if given else NONE], args.batch_size)
    if args.critic_adapter:
        return model, models.local(base, by_name[NONE if args.critic_adapter == NONE else "critic"], args.batch_size)
    return model, model


def _once(make: Callable[[], Any]) -> Callable[[], Any]:
    made: list[Any] = []

    def get() -> Any:
        if not made:
            made.append(make())
        return made[0]

    return get


def _write(path: Path, rows: Sequence[dict]) -> None:
    """Without any row there is no file: training refuses an empty one."""
    if rows:
        write_rows(path, rows)
    else:
        path.unlink(missing_ok=True)


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        print(line)


def _check(args: argparse.Namespace) -> None:
    """UserError for options that do nothing together."""
    if bool(args.model) == bool(args.workdir):
        raise UserError("give either --model (with or without --adapter) or --workdir (a run), which answers")
    if args.workdir and args.adapter:
        raise UserError("--adapter goes with --model; a --workdir has its own")
    if args.step and not args.workdir:
        raise UserError("--step goes with --workdir")
    if args.critic_url and not args.critic:
        raise UserError("--critic_url needs --critic NAME, the model that the endpoint is to ask")
    if args.critic_url and args.critic_adapter:
        raise UserError("--critic_adapter goes with a model here; leave it out beside --critic_url")
    if args.critic_adapter and args.workdir and not args.critic:
        raise UserError("--critic_adapter beside --workdir needs --critic, the model that it belongs to")
    if args.critic_key is not None and not args.critic_url:
        raise UserError("--critic_key goes with --critic_url")
    if args.dtype and args.workdir and (args.critic_url or not args.critic):
        raise UserError("--dtype goes with --model or a --critic here; a --workdir has the dtype of its config")
    if args.workdir:
        from ftjax.evals import best

        args.step = str(best.choose(Path(args.workdir), args.step))  # of a run that goes on the best may change


def main(args: argparse.Namespace) -> int:
    if args.show is not None:
        path = Path(args.show) if args.show else principles.SHIPPED
        principles.read(path)
        print(path.read_text(encoding="utf-8-sig"), end="")
        return 0
    _check(args)
    {"revise": revise, "compare": compare}[args.command](args)
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m ftjax.constitution", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--show", nargs="?", const="", metavar="FILE", help="print a constitution, once it is checked")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, what in (
        ("revise", "Answers, critiques and revisions: chains.jsonl to read, sft.jsonl to train on."),
        ("compare", "Pairs of answers and which is better: comparisons.jsonl to read, preferences.jsonl to train on."),
    ):
        sub = commands.add_parser(name, help=what, description=what, formatter_class=_Defaults)
        _define(sub, name)
    args = parser.parse_args(argv)
    if (args.show is None) == (args.command is None):
        parser.error("give a command, revise or compare, or --show")
    return args


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the defaults of those arguments that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, "") else super()._get_help_string(action)


def _define(sub: argparse.ArgumentParser, command: str) -> None:
    def group(title: str) -> Callable[..., Any]:
        return sub.add_argument_group(title).add_argument

    add = group("what is answered")
    add("--prompts", required=True, metavar="FILE", help="prompts: .txt, one a line, or rows as training reads them")
    add("--max_prompts", type=_count, default=0, help="of the prompts, how many are used, evenly spread; 0: all")
    add("--out", required=True, type=Path, metavar="DIR", help="where everything is kept; given again, it goes on")
    add = group("who answers")
    add("--model", help="a Hugging Face id, a directory, a .gguf file or package:NAME")
    add("--adapter", metavar="DIR", help="a PEFT adapter of --model")
    add("--workdir", help="a run of ftjax.train instead")
    add("--step", help="of the run: best, latest or a number")
    add("--temperature", type=float, default=1.0, help="of the answers")
    add("--max_new_tokens", type=_positive, default=256, help="the most tokens of whatever is written")
    add = group("who judges; without these, who answers")
    add("--critic", metavar="MODEL", help="another model; with --critic_url, its name there")
    add("--critic_adapter", metavar="DIR", help="a PEFT adapter of --critic or --model; none: --model without one")
    add("--critic_url", metavar="URL", help="an OpenAI-compatible endpoint, such as https://HOST/v1")
    add("--critic_key", metavar="VARIABLE", help="environment variable of its key (default: OPENAI_API_KEY); '': none")
    add("--critic_temperature", type=float, default=0.0, help="of what the critic writes; 0: the likeliest")
    add = group("by what")
    add("--constitution", type=Path, metavar="FILE", help="principles in YAML; default: those that ship (--show)")
    add(
        "--examples",
        type=Path,
        metavar="FILE",
        help="critiques and revisions by them in YAML; default: those that ship",
    )
    add("--shots", type=_count, default=3, help="examples that are shown before a request")
    if command == "revise":
        add("--rounds", type=_positive, default=1, help="of a critique and a revision, each by another principle")
    else:
        add("--principles", type=_positive, default=4, help="principles for a pair, over which it is averaged")
        add("--think", action="store_true", help="thoughts before a choice, whose probability is kept in 0.4 to 0.6")
        add("--least", type=_probability, default=0.5, help="least probability of a preference that is written")
    add = group("how")
    add("--batch_size", type=_positive, default=16, help="prompts in a block, which is kept or done again as a whole")
    add("--dtype", choices=configs.DTYPES, help="of weights and computation of --model and --critic (default: float32)")
    add("--seed", type=int, default=0, help="of the answers and of which principles are drawn")


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _probability(text: str) -> float:
    value = float(text)
    if not 0.5 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0.5 to below 1")
    return value


if __name__ == "__main__":
    _args = parse(sys.argv[1:])
    cli.run(lambda argv: main(_args), parse=lambda argv: cli.parse(argv[:1]))
