"""Text from a model, an adapter or a run, as it is generated.

    python -m ftjax.generate --model M [--adapter A] --prompt "..."     M: Hugging Face id, directory, .gguf, package:X
    python -m ftjax.generate --workdir runs/quickstart --prompt "..."   the best checkpoint of a run
    python -m ftjax.generate --workdir runs/quickstart --interpolate 0.7 --prompt "..."   so far from base to tuned
    python -m ftjax.generate --workdir runs/quickstart --chat           a conversation; an empty line ends it
    python -m ftjax.generate --workdir runs/quickstart --model M --prompt "..."   where the run's base is now at M
    python -m ftjax.generate --model M --adapter tickets=A,haiku=B --use haiku --chat
    python -m ftjax.generate --model M --prompts FILE --out FILE.jsonl    every prompt of a file, in batches
    python -m ftjax.generate --model M --prompts FILE --out FILE.jsonl --best_of 8 --reward json --temperature 1
    echo "..." | python -m ftjax.generate --model M                       the prompt from standard input (--prompt -)

With several adapters, --use names the one to begin with; in a conversation, "/adapter tickets" changes to another one
and "/adapter none" to the base alone.

--prompts takes a .txt file with a prompt a line, or rows in any format that training reads, whose answers are left out
(of a conversation, what follows the last turn of the user); --out gets {"prompt", "completion"} a line, in their order.

With --best_of N each prompt is completed N times, and the completion that the reward (a score, reward:PATH or
MODULE:FUNCTION) gives most is written, as {"prompt", "completion", "reward"}.

The prompt is put into the model's chat template where it has one; --raw leaves it as it is. Generation stops at any of
the model's end tokens, and before any text that --stop names. --temperature 0 (the default) is greedy.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from transformers import PreTrainedTokenizerFast

from ftjax import assemble, best_of, cli, distributed, interpolation, prompts
from ftjax import config as configs
from ftjax.adapted import NONE, load_model, parse_adapters
from ftjax.assemble import Base
from ftjax.data.tokens.chat import render_prompt
from ftjax.errors import UserError
from ftjax.evals import best
from ftjax.method import check_generates
from ftjax.sampling import stop_strings
from ftjax.sampling.engine import Engine, conversation, stream, stream_from
from ftjax.sampling.pictured import Pictured
from ftjax.sampling.request import Request
from ftjax.sampling.sampler import Sampling
from ftjax.training.display import Display


def initial_adapter(name: str | None, names: Iterable[str]) -> str:
    """The value of --use, which a single adapter does without; UserError if it is missing or unknown."""
    names = list(names)
    adapters = [adapter for adapter in names if adapter != NONE]
    if name is None and len(adapters) > 1:
        raise UserError(f"--use: say which of {', '.join(names)}")
    name = name or (adapters[0] if adapters else NONE)
    if name not in names:
        raise UserError(f"--use: there is no adapter {name!r}; there are {', '.join(names)}")
    return name


def stream_text(tokenizer: PreTrainedTokenizerFast, tokens: Iterator[int], stops: Sequence[str] = ()) -> Iterator[str]:
    """The text of the tokens in parts, each as soon as it is complete: a character may need several tokens.

    stops: strings that the text ends before; what may be the beginning of one waits.
    """
    ids, shown = [], ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith(stop_strings.UNFINISHED):
            text = stop_strings.settled(text, stops)
            yield text[len(shown) :]
            shown = text
    if ids:
        yield stop_strings.before(tokenizer.decode(ids, skip_special_tokens=True), stops)[len(shown) :]


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; the text goes after --prompt")
    if not (FLAGS.workdir or FLAGS.model):
        raise UserError("give either --workdir (a run) or --model (with or without --adapter)")
    if FLAGS.workdir and FLAGS.use:
        raise UserError("--use goes with --model alone; a --workdir has its own adapter")
    piped = not (FLAGS.chat or FLAGS.prompts or sys.stdin is None or sys.stdin.isatty())
    text = "-" if FLAGS.prompt is None and piped else FLAGS.prompt
    if [text is not None, bool(FLAGS.prompts), FLAGS.chat].count(True) != 1:
        raise UserError("give either --prompt '...' (- for standard input), --prompts FILE or --chat")
    if bool(FLAGS.prompts) != bool(FLAGS.out):
        raise UserError("--prompts FILE and --out FILE go together: the prompts, and where completions are written")
    if FLAGS["batch_size"].present and not FLAGS.prompts:
        raise UserError("--batch_size goes with --prompts")
    if FLAGS.best_of > 1 and not (FLAGS.prompts and FLAGS.reward and FLAGS.temperature):
        raise UserError(
            "--best_of goes with --prompts and --out, --reward (what is best) and a --temperature above 0, such as 1: "
            "at 0 all completions of a prompt are the same"
        )
    if FLAGS.best_of == 1 and (FLAGS.reward or FLAGS.run_code):
        raise UserError("--reward and --run_code choose among several completions; give --best_of, such as --best_of 8")
    if FLAGS.image and (text is None or FLAGS.raw):
        raise UserError("--image goes with --prompt and the chat template; rows of --prompts name their own images")
    if FLAGS.raw and (FLAGS.system or FLAGS.chat):
        raise UserError("--raw gives the prompt as it is; it takes no --system and no --chat")
    if FLAGS.workdir and FLAGS["dtype"].present:
        raise UserError("--dtype goes with --model alone; a --workdir has the dtype of its config")
    if not FLAGS.workdir and FLAGS["interpolate"].present:
        raise UserError("--interpolate goes with --workdir: it is between the base of a run and what was trained")
    share = interpolation.check(FLAGS.interpolate)
    distributed.refuse_several("ftjax.generate")
    stop_strings.check(FLAGS.stop, "--stop")
    sampling = Sampling(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p, FLAGS.seed, FLAGS.min_p)
    if FLAGS.prompts:
        prompts.check_out(Path(FLAGS.out))
    rewarded = best_of.questions_of(FLAGS.prompts, FLAGS.reward, FLAGS.run_code) if FLAGS.best_of > 1 else None
    if rewarded:
        asked = [question.prompt for question in rewarded.questions]
    elif FLAGS.prompts:
        asked = prompts.of_file(FLAGS.prompts)
    else:
        asked = [] if FLAGS.chat else [prompts.given(text, FLAGS.image)]
    if not FLAGS.workdir:
        adapters = parse_adapters(FLAGS.adapter) if FLAGS.adapter else {}
        in_use = initial_adapter(FLAGS.use, [NONE, *adapters])
        sees = any(prompt.has_images for prompt in asked)
        base, variables = load_model(FLAGS.model, adapters, FLAGS.dtype, vision=sees)
    else:
        in_use = "run"
        workdir, moved = Path(FLAGS.workdir), {"model": FLAGS.model, "adapter": FLAGS.adapter}
        _, base, trained, _ = assemble.load_run(
            workdir, best.choose(workdir, FLAGS.step), moved, check_generates, share
        )
        variables = {in_use: trained}

    talks: dict[str, Engine] = {}  # of each adapter that a conversation was with: what it has read of that

    def answer(prompt: np.ndarray | Pictured) -> str:
        stops_at, ends = stop_strings.stops_at(FLAGS.stop, base.tokenizer), base.end_tokens
        if FLAGS.chat:
            if in_use not in talks:
                talks[in_use] = conversation(base.model, variables[in_use], ends)
            tokens = stream_from(
                talks[in_use], Request(prompt, FLAGS.max_new_tokens, sampling, ends, stops_at=stops_at)
            )
        else:
            how = FLAGS.max_new_tokens, ends, sampling, stops_at
            tokens = stream(base.model, variables[in_use], prompt, *how)
        text = ""
        for part in stream_text(base.tokenizer, tokens, FLAGS.stop):
            print(part, end="", flush=True)
            text += part
        print()
        return text

    def switch(name: str) -> None:
        nonlocal in_use
        if name in variables:
            in_use = name
        print(f"[{in_use}]" if name in variables else f"[there is no {name!r}; there are {', '.join(variables)}]")

    if FLAGS.system and not base.tokenizer.chat_template:
        raise UserError("--system needs a chat template, which this model lacks; put the text into --prompt")
    system = [{"role": "system", "content": FLAGS.system}] if FLAGS.system else []
    if FLAGS.chat:
        _chat(base, system, answer, switch)
    elif not FLAGS.prompts:
        answer(prompts.tokens(asked[0], base.tokenizer, FLAGS.system or "", FLAGS.raw, base.images))
    else:
        with Display(1) as display:
            ids = prompts.encode(asked, base, FLAGS.max_new_tokens, FLAGS.system or "", FLAGS.raw)
            ids = [its for its in ids for _ in range(FLAGS.best_of)]
            answers = prompts.complete(
                *(base, variables[in_use], ids, FLAGS.max_new_tokens, sampling, FLAGS.batch_size, display),
                stops=FLAGS.stop,
            )
            texts, further = [answer.text for answer in answers], {}
            if rewarded:
                chosen = best_of.best(rewarded, texts, FLAGS.best_of)
                texts, further = [one.text for one in chosen], {"reward": [one.reward for one in chosen]}
            prompts.write(Path(FLAGS.out), asked, texts, further)
            display.say(f"{len(texts):,} completions are in {FLAGS.out}")
    return 0


def _chat(base: Base, messages: list[dict], answer: Callable[[np.ndarray], str], switch: Callable[[str], None]) -> None:
    """A conversation on the terminal, which begins with `messages`; an empty line ends it."""
    if not base.tokenizer.chat_template:
        raise UserError("this model has no chat template; use --prompt")
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        if not text.strip():
            return
        if text.startswith("/adapter"):
            switch(text.removeprefix("/adapter").strip())
            continue
        turn = [*messages, {"role": "user", "content": text}]
        reply = answer(render_prompt(turn, base.tokenizer))
        if reply.strip():  # a template has no way to render an empty answer
            messages = [*turn, {"role": "assistant", "content": reply}]


if __name__ == "__main__":
    sys.argv[0] = "ftjax.generate"  # absl shows in --help the flags defined under this name
    FLAGS = flags.FLAGS
    flags.DEFINE_string("model", None, "a Hugging Face id, a directory, a .gguf file or package:NAME")
    flags.DEFINE_string("adapter", None, "a PEFT adapter's directory, or several as name=DIR,other=DIR2")
    flags.DEFINE_string("use", None, "which of several adapters; none: the base alone")
    flags.DEFINE_string("workdir", None, "a run of ftjax.train; --model and --adapter beside it: where its own are now")
    flags.DEFINE_string("step", None, best.STEP_HELP)
    flags.DEFINE_float("interpolate", 1.0, interpolation.HELP)
    flags.DEFINE_string("prompt", None, "what to answer; - reads it from standard input")
    flags.DEFINE_string(
        "prompts", None, "a file of prompts to answer: .txt, one a line, or rows as training reads them"
    )
    flags.DEFINE_string("out", None, "with --prompts: the JSON Lines to write")
    flags.DEFINE_integer("batch_size", 16, "with --prompts: how many are completed together", lower_bound=1)
    flags.DEFINE_integer("best_of", 1, "with --prompts: write the best of so many completions", lower_bound=1)
    flags.DEFINE_string("reward", None, "with --best_of: what is best, a score, reward:PATH or MODULE:FUNCTION")
    flags.DEFINE_boolean("run_code", False, "with --reward: allow scores that run what the model writes")
    flags.DEFINE_multi_string("image", [], "with --prompt: a file that it is about; may be given several times")
    flags.DEFINE_string("system", None, "a system message before a prompt that has none")
    flags.DEFINE_boolean("chat", False, "a conversation: one line from you, one answer, and so on")
    flags.DEFINE_boolean("raw", False, "use the prompt as it is, without the chat template")
    flags.DEFINE_integer("max_new_tokens", 256, "the most tokens of an answer", lower_bound=1)
    flags.DEFINE_multi_string("stop", [], "text that ends an answer, and is left out; may be given several times")
    flags.DEFINE_float("temperature", 0.0, "0: always the likeliest token; 1: draw as the model says")
    flags.DEFINE_integer("top_k", 0, "draw from this many likeliest tokens; 0: from all")
    flags.DEFINE_float("top_p", 1.0, "draw from the likeliest tokens that together have this probability")
    flags.DEFINE_float("min_p", 0.0, "draw from tokens at least this many times as likely as the likeliest")
    flags.DEFINE_integer("seed", 0, "seed of the draws")
    flags.DEFINE_enum("dtype", "float32", configs.DTYPES, "dtype of weights and computation, with --model alone")
    cli.run(main)
