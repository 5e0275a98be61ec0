"""The model's own answers as candidates: several drawn for each prompt."""

from collections.abc import Iterable, Sequence

from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax import prompts
from ftjax.assemble import Base
from ftjax.data.audit.checks import spread
from ftjax.data.format.prompt import prompt_of
from ftjax.data.read.sources import read_sources
from ftjax.errors import UserError
from ftjax.labeling.candidates import Candidates, distinct, turns_of
from ftjax.prompts import Prompt
from ftjax.sampling.sampler import Sampling
from ftjax.training.display import Display
from ftjax.tree import Tree


def of_run(config: ConfigDict) -> list[Prompt]:
    """The prompts of a run's training rows, without texts and what is held out; UserError where none is left."""
    rows = read_sources(configs.sources(config, "train"), config.data.max_bad_rows, config.data.holdout)
    found = [Prompt(row.origin, prompt_of(row.fields, row.origin)) for row in rows if "text" not in row.fields]
    if not found:
        raise UserError("config.data.train of the run has no prompts, only texts; name some with --prompts FILE")
    return found


def some(asked: Iterable[Prompt], most: int) -> list[Prompt]:
    """`most` of the prompts at even distances, none twice; 0: all."""
    once = list({repr(turns_of(prompt.fields, prompt.origin)): prompt for prompt in asked}.values())
    return [once[i] for i in spread(len(once), most or len(once))]


def draw(
    base: Base,
    variables: Tree,
    asked: Sequence[Prompt],
    count: int,
    max_new_tokens: int,
    sampling: Sampling,
    batch_size: int,
    display: Display,
) -> list[Candidates]:
    """`count` answers to each prompt, of which empty and repeated ones are left out.

    Raises:
      UserError: a prompt is too long for the model; no prompt got two answers that differ.
    """
    ids = [tokens for tokens in prompts.encode(asked, base, max_new_tokens) for _ in range(count)]
    drawn = prompts.complete(base, variables, ids, max_new_tokens, sampling, batch_size, display, "sampling")
    if cut := sum(not answer.stopped for answer in drawn):
        display.say(
            f"{cut:,} of {len(drawn):,} answers are cut at --max_new_tokens={max_new_tokens}, and training would teach "
            "to end there; raise it to have them whole"
        )
    texts = [answer.text for answer in drawn]
    made = []
    for i, prompt in enumerate(asked):
        answers = [
            [{"role": "assistant", "content": text}] for text in texts[i * count : (i + 1) * count] if text.strip()
        ]
        tools = prompt.fields.get("tools", ())
        made.append(Candidates(turns_of(prompt.fields, prompt.origin), distinct(answers), tools, prompt.origin))
    if not any(len(one.answers) > 1 for one in made):
        raise UserError(
            f"none of {len(asked)} prompts got two answers that differ; raise --temperature, or --samples (now {count})"
        )
    return made
