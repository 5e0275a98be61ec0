"""Prompts on their way into a model: one, or those of a file, which are completed in batches."""

import sys
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ftjax import pictures
from ftjax.assemble import Base
from ftjax.atomic import write_rows
from ftjax.data.format import images
from ftjax.data.format.prompt import prompt_of
from ftjax.data.images.rules import ImageRules
from ftjax.data.read.sources import read_sources
from ftjax.data.tokens.chat import render_prompt
from ftjax.data.tokens.rendering import Tokenizer
from ftjax.errors import UserError
from ftjax.sampling import stop_strings
from ftjax.sampling.engine import generate, rows_per_batch
from ftjax.sampling.pictured import Pictured
from ftjax.sampling.sampler import Sampling
from ftjax.training.display import Display
from ftjax.tree import Tree


class Prompt(NamedTuple):
    """What is to be answered.

    Attributes:
      origin: where it is, for messages: "rows.jsonl:12" or "--prompt".
      fields: {"messages", "tools"?}, {"prompt"} or {"text"}, see `data.format.prompt.prompt_of`.
    """

    origin: str
    fields: dict

    @property
    def last(self) -> str:
        """What is asked last: the prompt, or of a conversation its last turn."""
        return _text(self.fields["messages"][-1]) if "messages" in self.fields else self.fields["prompt"]

    @property
    def has_images(self) -> bool:
        return any(turn.get("images") for turn in self.fields.get("messages", ()))


def given(text: str, files: Sequence[str] = ()) -> Prompt:
    """The prompt of a command line, after the images in `files`; "-" is all of standard input. UserError if empty."""
    origin = "--prompt"
    if text == "-":
        origin, text = "standard input", sys.stdin.read().removesuffix("\n")
    if not text.strip():
        raise UserError(f"{origin} is empty; give the text to answer with --prompt '...', or --prompts FILE, or --chat")
    if not files:
        return Prompt(origin, {"prompt": text})
    parts = [{"type": "image", "path": file} for file in files]
    fields = prompt_of({"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]}, origin)
    return Prompt(origin, images.placed(fields, str(Path.cwd()), "--image"))


def of_file(source: str) -> list[Prompt]:
    """The prompts of a .txt file, one a line, or of the rows of a file in any format that training reads.

    Raises:
      UserError: no such file, no prompt in it, or one that is empty, with its line.
    """
    path = Path(source)
    if path.suffix != ".txt":
        rows = read_sources([{"source": source}])
        origins = [rows.origin(i) for i in range(len(rows))]
        every = [images.placed(prompt_of(rows.raw(i), at), rows.folder(i), at) for i, at in enumerate(origins)]
        return list(map(Prompt, origins, every))
    lines = lines_of(path, "a prompt")
    return [Prompt(f"{path}:{i}", prompt_of({"prompt": line}, f"{path}:{i}")) for i, line in enumerate(lines, 1)]


def lines_of(path: Path, what: str) -> list[str]:
    """The lines of a text file, each of which is `what`; UserError where there is none, or it is not UTF-8."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error}); convert it") from error
    if not any(line.strip() for line in lines):
        raise UserError(f"{path}: is empty; write {what} on each line")
    return lines


def tokens(
    prompt: Prompt, tokenizer: Tokenizer, system: str = "", raw: bool = False, rules: ImageRules | None = None
) -> np.ndarray | Pictured:
    """int32 [n]: what the model is given to go on from; with the images, where there are some.

    Args:
      system: the system message of a conversation that has none.
      raw: the prompt's text as it is, without the chat template.
      rules: how the model takes images, if it does.
    """
    fields = prompt.fields
    if raw and "messages" in fields:
        raise UserError(f"{prompt.origin}: is a conversation, which --raw cannot give as it is")
    if system and "text" in fields:
        raise UserError(f"{prompt.origin}: is text to be continued, not a conversation; leave out --system")
    if raw or "text" in fields:
        return np.asarray(tokenizer.encode(fields.get("text", fields.get("prompt"))), np.int32)
    turns = fields.get("messages") or fields["prompt"]
    if system:
        turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
        if not any(turn["role"] in ("system", "developer") for turn in turns):
            turns = [{"role": "system", "content": system}, *turns]
    if rules is not None and not isinstance(turns, str):
        return pictures.prompt(turns, tokenizer, rules, fields.get("tools"), prompt.origin)
    return render_prompt(turns, tokenizer, fields.get("tools"), prompt.origin)


class Answer(NamedTuple):
    """A completion; its tokens are with the one that ended it. If it has not `stopped`, it was cut."""

    text: str
    prompt_tokens: int
    generated_tokens: int
    stopped: bool


def encode(
    prompts: Sequence[Prompt],
    base: Base,
    max_new_tokens: int,
    system: str = "",
    raw: bool = False,
    key: str = "--max_new_tokens",
) -> list[np.ndarray | Pictured]:
    """The `tokens` of every prompt; UserError for one that leaves no room for an answer. key: what limits answers."""
    ids = [tokens(prompt, base.tokenizer, system, raw, base.images) for prompt in prompts]
    positions = base.model.spec.max_position_embeddings
    for prompt, array in zip(prompts, ids, strict=True):
        if len(array) + max_new_tokens > positions:
            raise UserError(
                f"{prompt.origin}: its {len(array)} tokens and {key}={max_new_tokens} exceed the model's {positions} "
                f"positions; shorten it, or lower {key}"
            )
    return ids


def complete(
    base: Base,
    variables: Tree,
    ids: Sequence[np.ndarray | Pictured],
    max_new_tokens: int,
    sampling: Sampling,
    batch_size: int,
    display: Display,
    what: str = "completing",
    stops: Sequence[str] = (),
) -> list[Answer]:
    """The answers to prompts that `encode` made, in their order; see `sampling.engine.generate`.

    stops: strings that end an answer, and are not in its text.
    """
    shown, stops_at = 0, stop_strings.stops_at(stops, base.tokenizer)
    with jax.set_mesh(_mesh(variables)), display.counter(what, len(ids)) as advance:

        def on_progress(done: int, total: int) -> None:
            nonlocal shown
            advance(done)
            if not display.console.is_terminal and (done - shown >= total / 10 or done == total):
                shown = done
                display.say(f"{what}: {done:,} of {total:,}")

        ends = base.end_tokens
        made = generate(
            *(base.model, variables, ids, max_new_tokens, ends, sampling, batch_size, on_progress), stops_at=stops_at
        )
    texts = [base.tokenizer.decode(completion.tokens, skip_special_tokens=True) for completion in made]
    texts = [stop_strings.before(text, stops) for text in texts]
    return [
        Answer(text, len(prompt), len(completion.logps), completion.stopped)
        for text, prompt, completion in zip(texts, ids, made, strict=True)
    ]


def seconds_per_answer(
    base: Base, variables: Tree, ids: Sequence[np.ndarray | Pictured], max_new_tokens: int, batch_size: int
) -> tuple[float, int]:
    """(seconds of a batch over its answers, how many these are): the greedy answers to the prompts of medium length.

    Call it after `complete` with the same arguments: nothing is compiled then.
    """
    with jax.set_mesh(_mesh(variables)):
        rows = min(rows_per_batch(len(ids), batch_size), len(ids))
        by_length = sorted(ids, key=len)
        first = (len(ids) // rows // 2) * rows
        batch = by_length[first : first + rows] if first + rows <= len(ids) else by_length[-rows:]
        began = time.perf_counter()
        generate(base.model, variables, batch, max_new_tokens, base.end_tokens, Sampling(), rows)
        return (time.perf_counter() - began) / rows, rows


def _mesh(variables: Tree) -> Mesh:
    return jax.tree.leaves(variables)[0].sharding.mesh


def check_out(out: Path) -> None:
    """UserError where completions cannot be written to `out`: now, and not after they were made."""
    if out.is_file() or out.is_dir():
        raise UserError(f"--out {out}: exists; name another file or remove it")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no directory {out.parent}; make it first")


def write(
    out: Path,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    further: Mapping[str, Sequence] = types.MappingProxyType({}),
) -> None:
    """Writes JSON Lines of "prompt" and "completion", and what `further` has for each.

    The prompt is a string, or where the conversation has more than one turn its messages; the completion is a string.
    """
    columns = {"prompt": [_shown(prompt.fields) for prompt in prompts], "completion": completions, **further}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    write_rows(out, rows)


def _shown(fields: dict) -> str | list[dict]:
    turns = fields.get("messages")
    if turns is None:
        return fields.get("prompt", fields.get("text"))
    return _text(turns[0]) if len(turns) == 1 and turns[0]["role"] == "user" else turns


def _text(turn: dict) -> str:
    """A turn's text, which says where images are."""
    return turn["content"].replace(images.MARK, images.TAG) if turn.get("images") else turn["content"]
