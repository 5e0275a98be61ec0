"""Whether a run fits a TPU slice, and how fast it can be.

    python -m ftjax.plan --config llama3_1_8b_lora --topology v5e:4x4
    python -m ftjax.plan --config mine.yaml --config.data.max_length=8192 --topology v5p:2x2x2 --search --json PLAN

Compiles the real training step for the slice, which need not exist, without reading weights or data. If it does not
fit, changes that may fit are tried; --search tries changes that may be faster.
Exit status: 0 it fits, 1 it does not, 2 a mistake in what was asked.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from ftjax import choices, cli, config_flag, preflight, rewards, sharding
from ftjax import config as configs
from ftjax.atomic import write_text
from ftjax.data.tokens import tokenizer as tokenizers
from ftjax.errors import UserError
from ftjax.method import method_of
from ftjax.models import published
from ftjax.models.families import spec_from_config
from ftjax.models.spec import DecoderSpec
from ftjax.planning import advice, compiled, table, topology, writing
from ftjax.planning.roofline import ASSUMPTIONS
from ftjax.training.display import Display
from ftjax.weights.source import locate, open_source

EXIT_DOES_NOT_FIT = 1


def model_spec(source: str, revision: str = "") -> DecoderSpec:
    """The spec of a directory, a file or a Hugging Face id, whose weights are not downloaded; of well-known models also
    without any file."""
    if not Path(source).expanduser().exists() and (known := published.find(source)):
        return spec_from_config(known)
    path = locate(source, revision, weights=False)
    if path.is_dir():  # config.json alone is enough
        return spec_from_config(json.loads((path / "config.json").read_text(encoding="utf-8-sig")))
    return spec_from_config(open_source(path).config)


def with_new_tokens(config: ConfigDict, spec: DecoderSpec) -> DecoderSpec:
    """The spec with rows for the tokens that config.model adds, at most so many: some tables have spare ones."""
    rows = spec.vocab_size
    if config.resize_vocab:
        rows = max(rows, tokenizers.rows_needed(tokenizers.load(locate(config.source))))
    return dataclasses.replace(spec, vocab_size=rows + len(config.add_tokens))


def plan(
    config: ConfigDict, topology_name: str, display: Display, out: Path | None = None, search: bool = False
) -> int:
    """Prints the plan of `config` on a topology such as "v5e:4x4", and writes it to `out`; returns the exit status."""
    configs.validate(config, data=False)
    preflight.check_used(config)
    slice_ = topology.parse(topology_name)
    devices = topology.devices(slice_)
    beside = rewards.needed(config, devices)  # of models that lie beside the one that learns, whatever it does
    slice_ = slice_.less(beside)
    spec = with_new_tokens(config.model, model_spec(config.model.source, config.model.revision))
    mesh = sharding.make_mesh(dict(config.mesh), devices)
    teacher = model_spec(config.objective.teacher) if method_of(config).distills else None
    config = choices.without_data(config, spec, mesh, slice_.chip.usable, teacher)
    describe = functools.partial(compiled.describe, spec=spec, devices=devices, teacher=teacher)
    program = describe(config)
    display.say(f"compiling for {slice_}")
    result = compiled.plan(program, slice_)
    report = table.as_json(config, slice_, program, result) | ({"reward_models": beside} if beside else {})
    display.table(f"ftjax.plan {config.model.source}", table.rows(report, slice_))
    fits = result.fits
    if written := writing.plan(config, program, slice_):
        fits = fits and written.fits
        report["writing"] = table.writing(written, result.roofline and result.roofline.step)
        display.table("what the model writes", table.writing_rows(report["writing"], slice_.chip.usable))
    display.say("\n".join(["assuming", *(f"  {line}" for line in ASSUMPTIONS)]))
    if search or not result.fits:
        if search:
            tried = advice.search(config, spec, slice_, describe, display.say)
        else:
            tried = advice.try_all(advice.remedies(config, slice_), describe, slice_, display.say)
        report["tried"] = table.tried(tried)
        display.table("what may be faster" if search else "what would fit", table.tried_rows(report["tried"]))
        if not result.fits and not any(entry["fits"] for entry in report["tried"]):
            display.say("none of these fits: take more chips, or chips with more memory")
    if out is not None:
        write_text(out, json.dumps(report, indent=2) + "\n")
    return 0 if fits else EXIT_DOES_NOT_FIT


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --")
    if not _TOPOLOGY.value:
        raise UserError("--topology is missing; for example --topology v5e:4x4")
    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine stays free for others
    config = config_flag.value()
    with Display(1) as display:
        return plan(config, _TOPOLOGY.value, display, Path(_JSON.value) if _JSON.value else None, _SEARCH.value)


if __name__ == "__main__":
    sys.argv[0] = "ftjax.plan"  # absl shows in --help the flags defined under this name
    config_flag.define()
    _TOPOLOGY = flags.DEFINE_string(
        "topology", None, "the slice, e.g. v5e:4x4, v5p:2x2x2, or 2x v5e:4x4 for two of them"
    )
    _JSON = flags.DEFINE_string("json", None, "also write the plan to this file")
    _SEARCH = flags.DEFINE_bool("search", False, "also look for the fastest mesh, remat and accumulation that fit")
    cli.run(main, config_flag.parse)
