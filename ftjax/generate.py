"""Text from a model, an adapter or a run, as it is generated.

    python -m ftjax.generate --model M [--adapter A] --prompt "..."     M: Hugging Face id, directory, .gguf, package:X
    python -m ftjax.generate --workdir runs/quickstart --prompt "..."   the newest checkpoint of a run
    python -m ftjax.generate --workdir runs/quickstart --chat           a conversation; an empty line ends it

The prompt is put into the model's chat template where it has one; --raw gives it to the model as it is. Generation
stops at every end token that the model names. --temperature 0 (the default) is greedy.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags

from ftjax import assemble, cli, lora, sharding
from ftjax import config as configs
from ftjax.assemble import Base
from ftjax.data.chat import render_prompt
from ftjax.errors import UserError
from ftjax.models.params import abstract_params
from ftjax.sampling.engine import stream
from ftjax.sampling.sampler import Sampling
from ftjax.tree import Tree
from ftjax.weights.load import load_params
from ftjax.weights.peft import read_adapter


def load_model(source: str, adapter: str | None, dtype: str) -> tuple[Base, Tree]:
    """A pretrained model and, from a PEFT directory, its adapter, as (base, variables), over this machine's devices."""
    config = configs.defaults()
    config.model.source, config.model.dtype, config.model.param_dtype = source, dtype, dtype
    base = assemble.open_base(config.model)
    mesh = sharding.make_mesh({"fsdp": -1})
    variables = {"params": load_params(base.reader, base.model.spec, abstract_params(base.model, mesh))}
    if adapter:
        matrices, settings = read_adapter(Path(adapter), base.model.spec)
        scaling = lora.scale(settings["rank"], settings["alpha"], settings["rslora"])
        variables["lora"] = jax.device_put(lora.with_scale(matrices, scaling), sharding.replicated(mesh))
    return base, variables


def pieces(tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """The text of the tokens as it becomes certain: a character split over several tokens comes out whole."""
    ids, shown = [], ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # an unfinished UTF-8 sequence
            yield text[len(shown) :]
            shown = text
    if ids:
        yield tokenizer.decode(ids, skip_special_tokens=True)[len(shown) :]


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; the text goes after --prompt")
    if bool(FLAGS.workdir) == bool(FLAGS.model):
        raise UserError("give either --workdir (a run) or --model (with or without --adapter)")
    if FLAGS.workdir and FLAGS.adapter:
        raise UserError("--adapter goes with --model; a --workdir has its own")
    if (FLAGS.prompt is None) == (not FLAGS.chat):
        raise UserError("give either --prompt '...' or --chat")
    if FLAGS.raw and (FLAGS.system or FLAGS.chat):
        raise UserError("--raw gives the prompt as it is; it takes no --system and no --chat")
    if FLAGS.workdir and FLAGS["dtype"].present:
        raise UserError("--dtype goes with --model; a --workdir has the dtype of its config")
    sampling = Sampling(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p, FLAGS.seed)
    if FLAGS.workdir:
        _, base, variables, _ = assemble.load_run(Path(FLAGS.workdir), FLAGS.step)
    else:
        base, variables = load_model(FLAGS.model, FLAGS.adapter, FLAGS.dtype)

    def answer(prompt: np.ndarray) -> str:
        tokens = stream(base.model, variables, prompt, FLAGS.max_new_tokens, base.end_tokens, sampling)
        text = ""
        for piece in pieces(base.tokenizer, tokens):
            print(piece, end="", flush=True)
            text += piece
        print()
        return text

    if FLAGS.system and not base.tokenizer.chat_template:
        raise UserError("--system needs a chat template, which this model has not; put the text into --prompt")
    system = [{"role": "system", "content": FLAGS.system}] if FLAGS.system else []
    if FLAGS.chat:
        _chat(base, system, answer)
    elif FLAGS.raw:
        answer(np.asarray(base.tokenizer.encode(FLAGS.prompt), np.int32))
    elif base.tokenizer.chat_template:
        answer(render_prompt([*system, {"role": "user", "content": FLAGS.prompt}], base.tokenizer))
    else:
        answer(render_prompt(FLAGS.prompt, base.tokenizer))
    return 0


def _chat(base: Base, messages: list[dict], answer) -> None:
    if not base.tokenizer.chat_template:
        raise UserError("this model has no chat template; use --prompt")
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        if not text.strip():
            return
        turn = [*messages, {"role": "user", "content": text}]
        said = answer(render_prompt(turn, base.tokenizer))
        if said.strip():  # a template has no way to render an empty answer
            messages = [*turn, {"role": "assistant", "content": said}]


if __name__ == "__main__":
    sys.argv[0] = "ftjax.generate"  # absl shows in --help the flags defined under this name
    FLAGS = flags.FLAGS
    flags.DEFINE_string("model", None, "a Hugging Face id, a directory, a .gguf file or package:NAME")
    flags.DEFINE_string("adapter", None, "a directory with a PEFT LoRA adapter for --model")
    flags.DEFINE_string("workdir", None, "a run of ftjax.train")
    flags.DEFINE_integer("step", None, "the run's checkpoint to use (default: the newest)")
    flags.DEFINE_string("prompt", None, "what to answer")
    flags.DEFINE_string("system", None, "a system message before it")
    flags.DEFINE_boolean("chat", False, "talk: one line from you, one answer, and so on")
    flags.DEFINE_boolean("raw", False, "the prompt as it is, without the chat template")
    flags.DEFINE_integer("max_new_tokens", 256, "where to stop at the latest", lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "0: always the likeliest token; 1: draw as the model says")
    flags.DEFINE_integer("top_k", 0, "draw from the so many likeliest tokens; 0: from all")
    flags.DEFINE_float("top_p", 1.0, "draw from the likeliest tokens that together have this probability")
    flags.DEFINE_integer("seed", 0, "of the draws")
    flags.DEFINE_enum("dtype", "float32", configs.DTYPES, "of weights and computation, with --model")
    cli.run(main)
