"""A run's result in the formats that other software reads.

    python -m ftjax.export --workdir runs/quickstart --format peft   --out adapter     a LoRA adapter (peft, vLLM, ...)
    python -m ftjax.export --workdir runs/quickstart --format merged --out model       the base with the adapter in it
    python -m ftjax.export --workdir runs/quickstart --format hf     --out model       the model, however it was trained
    python -m ftjax.export --workdir runs/quickstart --format gguf   --out model.gguf  for llama.cpp, Ollama, ...

`merged` and `hf` write a whole Hugging Face model: `hf` of any run (a fully fine-tuned model as it is, an adapter
merged), `merged` only of a run with an adapter. The dtype is that of the base's files (bfloat16 stays bfloat16), or of
the run where the base is a GGUF; --dtype float32 keeps every bit that was trained.

--interpolate 0.7 goes only so much of the way from the base to what was trained, in any format (docs/remedies.md).

What is written is read back and compared before it takes its name; an --out that exists is never overwritten. Whole
models are also loaded again and given prompts, in float32; parity.json in the directory (MODEL.gguf.parity.json beside
a GGUF) says how far their logits are from the run's, and the export fails if they differ by more than the stored type
explains. The run's weights are released before, so this needs memory for the larger of the two (a GGUF is loaded as
float32) and for the logits.
"""

import collections
import copy
import functools
import math
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from ftjax import assemble, cli, distributed, exportable, interpolation, lora, parity, quant, tree
from ftjax import config as configs
from ftjax.assemble import Base
from ftjax.atomic import room_for
from ftjax.data.tokens import tokenizer as tokenizers
from ftjax.distributed import is_first, together
from ftjax.errors import UserError
from ftjax.evals import best
from ftjax.method import learning_rate
from ftjax.models.families import is_inside, spec_from_config
from ftjax.models.heads import COLLECTION
from ftjax.models.spec import DecoderSpec
from ftjax.reporting import gather
from ftjax.training import metrics
from ftjax.tree import Tree
from ftjax.weights.gguf.write import GGUF_TYPES, write_gguf
from ftjax.weights.hf.classifier import Head
from ftjax.weights.hf.end_tokens import unnamed
from ftjax.weights.hf.files import read_json
from ftjax.weights.hf.keys import FLOATS, hf_names
from ftjax.weights.hf.model_card import model_card, shown
from ftjax.weights.hf.together import new_directory_together
from ftjax.weights.hf.write import generation_config, write_json, write_model, write_processor, write_tokenizer
from ftjax.weights.peft import continued
from ftjax.weights.peft.adapter import write_adapter
from ftjax.weights.peft.vllm import MAX_RANK, uniform
from ftjax.weights.source import Reader

FORMATS = ("peft", "merged", "hf", "gguf")
_GGUF_STORES = {"f16": "float16", "bf16": "bfloat16", "q8_0": "q8_0"}  # keys of `parity.LIMITS`
_BYTES = {"float32": 4, "q8_0": 34 / 32}  # of a value; 2 in all other types
assert _GGUF_STORES.keys() == GGUF_TYPES.keys()


def export_peft(
    workdir: Path,
    step: int | None,
    out: Path,
    vllm_rank: int | None = None,
    moved: Mapping[str, str] | None = None,
    share: float = 1.0,
) -> int:
    """Writes the adapter alone; returns its step. Raises UserError for a run that trained the base itself.

    vllm_rank: the largest rank of the vLLM that is to read it (see `ftjax.weights.peft.vllm`); None: it is for peft.
    moved, share: as in `load_run`.
    """

    check = functools.partial(exportable.check_peft, vllm_rank=vllm_rank)
    run, base, variables, step = assemble.load_run(workdir, step, moved, check, share)
    config = _effective(run, base)
    head = exportable.head_of(run, base, variables)
    params = tree.flatten(exportable.without_token_head(variables["params"], variables))
    whole = assemble.trained_whole(run, base) & params.keys()
    ends = [] if head else base.tokenizer.convert_ids_to_tokens(unnamed(base.reader.config, base.end_tokens))
    adapters = variables["lora"] if vllm_rank is None else uniform(variables["lora"], whole, vllm_rank)
    saved = {path: params[path] for path in whole}
    save_tokenizer = functools.partial(_write_tokenizer, run, base, head=head) if _has_own_tokenizer(run) else None
    with room_for(out, sum(leaf.nbytes for leaf in [*tree.flatten(adapters).values(), *saved.values()])):
        write_adapter(
            out,
            adapters,
            base.model.spec,
            assemble.base_facts(config, base),
            # For vLLM all scales are 1, for which rsLoRA has no round alpha.
            rslora=config.adapter.rslora and vllm_rank is None,
            saved=saved,
            multimodal=is_inside(base.reader.config, whole=head is not None or vllm_rank is not None),
            card=model_card(
                out.name,
                "peft",
                config,
                step,
                base.path,
                evaluation(workdir, step),
                published=assemble.published(base),
                ends=ends,
                results=results(workdir, step),
                notes=_of_share(share) + _of_head(head),
                head=head and _shown_head(head, base),
                # Of some families transformers has no class for the language model inside alone.
                images=head is None and is_inside(base.reader.config),
            ),
            generation=generation_config(exportable.model_config(base), _sampling(base)) if ends else None,
            save_tokenizer=save_tokenizer,
            head=head,
        )
    if ends and is_first():
        print(
            f"the model stops at {', '.join(ends)}, which the base's generation config does not name: use the "
            "generation_config.json beside the adapter (README.md says how)"
        )
    if config.quantize.base != "none" and is_first():
        print(f"the adapter was trained beside a base stored as {config.quantize.base}; beside another it differs")
    return step


def export_model(
    workdir: Path,
    step: int | None,
    format: str,
    out: Path,
    dtype: str | None,
    gguf_type: str,
    moved: Mapping[str, str] | None = None,
    share: float = 1.0,
) -> int:
    """Writes the whole model (`merged`, `hf` or `gguf`) with its parity.json; returns its step.

    All processes of a run call it alike; `out` must be on a disk that they share. moved, share: as in `load_run`.
    """
    if format == "gguf" and distributed.count() > 1:
        raise UserError("--format gguf is for one process; export --format hf, and that with llama.cpp's converter")

    of_tokenizer: dict[str, Any] = {}  # the metadata of a GGUF

    def check(config: ConfigDict, base: Base, variables: Tree) -> None:
        of_tokenizer.update(exportable.check_model(format, config, base, variables))

    config, base, variables, step = assemble.load_run(workdir, step, moved, check, share)
    came_of_it = results(workdir, step)
    config = _effective(config, base)
    mesh = jax.tree.leaves(variables)[0].sharding.mesh
    spec = base.model.spec
    texts = parity.prompts(base.tokenizer, workdir / "samples.jsonl", spec.max_position_embeddings, spec)
    expected = parity.logits(base.model, variables, texts, mesh)
    compare = parity.number_differences if COLLECTION in variables else parity.differences
    base_difference = None
    if "lora" in variables:
        plain = {name: part for name, part in variables.items() if name != "lora"}
        base_difference = compare(expected, parity.logits(base.model, plain, texts, mesh))

    # A GGUF gets a temporary directory too, so that it and its parity.json appear only when both are complete.
    target = out.with_name(f".{out.name}.export") if format == "gguf" else out
    head = exportable.head_of(config, base, variables)
    notes = _of_share(share) + _notes(config, base, variables) + _of_head(head)
    stored = _GGUF_STORES[gguf_type]
    if format != "gguf":
        stored = dtype or stored_dtype(base.reader, config.model.param_dtype)
    with room_for(out, _stored_bytes(base, stored)), new_directory_together(target) as directory:
        written = directory / out.name if format == "gguf" else directory
        if format == "gguf":
            _write_gguf(written, base, variables, gguf_type, of_tokenizer, name=out.stem)
        else:
            _write_directory(written, config, base, variables, stored, head)
        del variables  # releases the run's weights before the export's are loaded
        difference = compare(
            expected, parity.logits(*parity.reload(written, mesh, base.model.spec.vision is not None), texts, mesh)
        )
        parity.check(difference, stored)
        about = {"run": workdir.resolve().name, "step": step, "format": format, "base_model": shown(base.source)}
        if share != 1:
            about["interpolate"] = share
        if notes:
            about["notes"] = notes
        report = parity.report(texts, stored, difference, base_difference, **about)
        with together(f"writing {directory}"):
            if is_first():
                write_json(directory / "parity.json", report)
            if is_first() and format != "gguf":
                _check_tokenizer(written, texts, workdir)
                card = model_card(
                    out.name,
                    "transformers",
                    config,
                    step,
                    base.path,
                    evaluation(workdir, step),
                    report,
                    assemble.published(base),
                    results=came_of_it,
                    head=head and _shown_head(head, base),
                    images=base.model.spec.vision is not None,
                )
                (directory / "README.md").write_text(card, encoding="utf-8")
    if format == "gguf":
        try:
            os.replace(target / out.name, out)
            os.replace(target / "parity.json", f"{out}.parity.json")
        finally:
            shutil.rmtree(target)
    _print_report(report, notes)
    return step


def stored_dtype(reader: Reader, param_dtype: str) -> str:
    """The dtype of most of the base's values; `param_dtype` for a GGUF, whose types no other format has."""
    if reader.path.suffix == ".gguf":
        return param_dtype
    size = collections.Counter()
    for name in reader.names():
        size[reader.dtype(name).name] += math.prod(reader.shape(name))
    return max((name for name in size if name in FLOATS), key=size.__getitem__)


def _stored_bytes(base: Base, stored: str) -> int:
    """About how large the whole model's file is."""
    values = sum(math.prod(key.our_shape) for key in hf_names(base.model.spec).values())
    return int(values * _BYTES.get(stored, 2))


def evaluation(workdir: Path, step: int) -> dict[str, float]:
    """The `eval_*` metrics of the run's last evaluation at or before `step`."""
    records = filter(metrics.is_eval, metrics.read(workdir / "metrics.jsonl"))
    records = [record for record in records if record["step"] <= step]
    return {name: value for name, value in records[-1].items() if name.startswith("eval_")} if records else {}


def results(workdir: Path, step: int) -> list[str]:
    """What the card says of the run's evaluations: sentences, none of a run without one."""
    run = gather.gather(workdir, step)
    return gather.summary(run) if run.evaluation or gather.changes(run) else []


def _notes(config: ConfigDict, base: Base, variables: Tree) -> list[str]:
    """Effects of merging that a user should know; for the terminal, parity.json and the card."""
    notes = []
    if "quant" in variables:
        notes.append(
            f"The adapter was trained beside a base stored as {config.quantize.base}. It is merged into that base, "
            f"dequantized, and not into the weights of {shown(base.source)} as they were published."
        )
    if exportable.must_untie(base.model.spec, variables):
        notes.append(
            "The adapter changes the token embedding and not the output head, which were one matrix. They are two here "
            "(tie_word_embeddings is false), and the head is the base's."
        )
    return notes


def _of_share(share: float) -> list[str]:
    if share == 1:
        return []
    return [
        f"The weights are interpolated: {share:g} of the way from the base to what was trained. The run's evaluation "
        "is of what was trained, at 1."
    ]


def _of_head(head: Head | None) -> list[str]:
    """What a user of a reward model or a classifier should know of its scores."""
    if head is None:
        return []
    notes = []
    if "mean" in head.facts:
        parts = [f"{mean:.4g} and {std:.4g}" for mean, std in zip(head.facts["mean"], head.facts["std"], strict=True)]
        notes.append(
            f"Rewards of the training pairs had the mean and the standard deviation {'; '.join(parts)}. The head has "
            "no bias that could hold them: transformers gives rewards as they are, and `ftjax_reward` in config.json "
            "(of an adapter in ftjax_adapter.json) has what ftjax normalizes them with."
        )
    if head.pad is None and not head.of_tokens:
        notes.append(
            "No token of this tokenizer could pad: each may end a text, and transformers reads a score at the last "
            "token that is not padding. So pad_token_id is null, and texts are scored one at a time. A run with "
            "config.model.add_tokens=('<|pad|>',) has a token for it."
        )
    return notes


def _shown_head(head: Head, base: Base) -> dict[str, Any]:
    """What the card shows of a head."""
    pad = None if head.pad is None else base.tokenizer.convert_ids_to_tokens(head.pad)
    return {"kind": head.kind, "labels": head.labels, "pad_token": pad}


def _whole(base: Base, variables: Tree) -> tuple[DecoderSpec, Tree]:
    """(spec, dequantized parameters) that the adapters are to be merged into."""
    params = quant.whole_params(variables, base.model.param_dtype)
    if exportable.must_untie(base.model.spec, variables):
        params = params | {"lm_head": {"kernel": params["embed_tokens"]["embedding"].T}}
    params = exportable.without_token_head(params, variables)
    return exportable.written_spec(base, variables), params


def _sampling(base: Base) -> dict[str, Any] | None:
    """The base's generation_config.json, where it has one."""
    file = base.path / "generation_config.json"
    return read_json(file) if base.path.is_dir() and file.is_file() else None


def _effective(config: ConfigDict, base: Base) -> ConfigDict:
    """The config with what the run really had in the place of what it took from elsewhere."""
    effective = continued.effective(config, base.model.spec)
    effective.optimizer.learning_rate = learning_rate(config)
    return effective


def _has_own_tokenizer(config: ConfigDict) -> bool:
    """Whether a run renders with another tokenizer or template than its base's."""
    model, data = config.model, config.data
    return bool(model.add_tokens or model.resize_vocab or data.chat_template or data.system)


def _write_tokenizer(config: ConfigDict, base: Base, directory: Path, head: Head | None = None) -> None:
    tokenizer = exportable.written_tokenizer(base)
    if head is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = None if head.pad is None else tokenizer.convert_ids_to_tokens(head.pad)
    write_tokenizer(directory, tokenizer, base.path, bool(config.model.add_tokens), head is not None)


def _write_directory(
    directory: Path, config: ConfigDict, base: Base, variables: Tree, dtype: str, head: Head | None
) -> None:
    spec, params = _whole(base, variables)
    write_model(
        directory,
        params,
        spec,
        exportable.model_config(base),
        adapters=exportable.without_token_head(variables.get("lora", {}), variables),
        generation=_sampling(base),
        dtype=jnp.dtype(dtype),
        head=head,
    )
    with together(f"writing {directory}"):
        if is_first():
            _write_tokenizer(config, base, directory, head)
            if spec.vision is not None:
                write_processor(directory, base.path)


def _write_gguf(out: Path, base: Base, variables: Tree, kind: str, of_tokenizer: dict[str, Any], name: str) -> None:
    spec, merged = _whole(base, variables)
    if "lora" in variables:
        merged = lora.merge(merged, variables["lora"])
    write_gguf(out, merged, spec, exportable.gguf_config(base, spec), kind, of_tokenizer, name, shown(base.source))


def _check_tokenizer(directory: Path, texts: list[parity.Prompt], workdir: Path) -> None:
    """UserError unless the tokenizer that was written gives the same tokens as the run's."""
    positions = spec_from_config(read_json(directory / "config.json")).max_position_embeddings
    again = parity.prompts(tokenizers.load(directory), workdir / "samples.jsonl", positions)
    for before, after in zip([prompt for prompt in texts if prompt.images is None], again, strict=True):
        if not np.array_equal(before.tokens, after.tokens):
            raise UserError(f"{directory}: the tokenizer that was written gives other tokens for {before.text!r}")


def _print_report(report: dict[str, Any], notes: list[str]) -> None:
    if not is_first():
        return
    for note in notes:
        print(note)
    what, more = "score", ""
    if "mean_kl" in report:
        what = "logit"
        more = (
            f"; mean KL {report['mean_kl']:.2g}; the likeliest token is the same at {report['top1_agreement']:.1%} of "
            f"{report['positions']} positions"
        )
    print(
        f"against the run, on {len(report['prompts'])} prompts: {what}s differ by "
        f"{report[f'max_abs_{what}_difference']:.2g} at most, {report[f'mean_abs_{what}_difference']:.2g} in the mean"
        f"{more}"
    )
    base_difference = report["base_without_adapter"]
    if base_difference and report["relative_difference"] > base_difference["relative_difference"] / 2:
        print(
            f"warning: {report['stored_as']} changes this model about as much as its adapter does; "
            "use --dtype float32, or --format peft"
        )


def check(format: str, out: Path, dtype: str | None, gguf_type: str | None) -> None:
    """Raises UserError for mistakes that need no loading to be noticed; None: the flag was not given."""
    if dtype and format not in ("merged", "hf"):
        raise UserError("--dtype goes with --format merged or hf; an adapter is float32, a GGUF has --gguf_type")
    if gguf_type and format != "gguf":
        raise UserError("--gguf_type goes with --format gguf")
    if format == "gguf" and out.suffix != ".gguf":
        raise UserError(f"--out {out}: name a file that ends in .gguf")
    if out.exists() and (format == "gguf" or not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists; name another --out or remove it")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --")
    if not (FLAGS.workdir and FLAGS.out and FLAGS.format):
        raise UserError(f"give --workdir (a run), --format ({', '.join(FORMATS)}) and --out (what to make)")
    workdir, out = Path(FLAGS.workdir), Path(FLAGS.out).absolute()
    check(FLAGS.format, out, FLAGS.dtype, FLAGS.gguf_type)
    share = interpolation.check(FLAGS.interpolate)
    if FLAGS.format != "peft" and FLAGS.vllm:
        raise UserError("--vllm goes with --format peft; whole models are read by vLLM as they are")
    moved = {"model": FLAGS.model, "adapter": FLAGS.adapter}
    with distributed.connected(FLAGS):
        step = best.choose(workdir, FLAGS.step)
        if FLAGS.format == "peft":
            step = export_peft(workdir, step, out, FLAGS.vllm_rank if FLAGS.vllm else None, moved, share)
        else:
            gguf_type = FLAGS.gguf_type or "f16"
            step = export_model(workdir, step, FLAGS.format, out, FLAGS.dtype, gguf_type, moved, share)
        if is_first():
            print(f"step {step} of {FLAGS.workdir} is in {FLAGS.out}")
    return 0


if __name__ == "__main__":
    sys.argv[0] = "ftjax.export"  # absl shows in --help the flags defined under this name
    FLAGS = flags.FLAGS
    flags.DEFINE_string("workdir", None, "a run of ftjax.train")
    flags.DEFINE_string("model", None, "where the run's base is now, if it was moved")
    flags.DEFINE_string("adapter", None, "where the adapter that the run went on from is now, if it was moved")
    flags.DEFINE_enum("format", None, FORMATS, "an adapter, a merged model, any whole model, or a GGUF")
    flags.DEFINE_string("out", None, "the directory, or the .gguf file, to make")
    flags.DEFINE_string("step", None, best.STEP_HELP)
    flags.DEFINE_float("interpolate", 1.0, interpolation.HELP)
    flags.DEFINE_enum("dtype", None, configs.DTYPES, "of a merged or whole model (default: that of the base's files)")
    flags.DEFINE_boolean("vllm", False, "an adapter for vLLM: plain LoRA of one rank, or refused")
    flags.DEFINE_integer("vllm_rank", MAX_RANK, "the --max-lora-rank that vLLM is started with", lower_bound=1)
    distributed.define_flags()
    flags.DEFINE_enum("gguf_type", None, sorted(GGUF_TYPES), "type of the matrices in a GGUF (default: f16)")
    cli.run(main)
