"""A run's result in the formats that other software reads.

    python -m ftjax.export --workdir runs/quickstart --format peft   --out adapter   a LoRA adapter (peft, vLLM, ...)
    python -m ftjax.export --workdir runs/quickstart --format merged --out model     a whole Hugging Face model

What is written is read back and compared before it takes its name; an --out that exists is never overwritten.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from ftjax import assemble, cli, lora, tree
from ftjax.assemble import Base
from ftjax.errors import UserError
from ftjax.tree import Tree
from ftjax.weights.peft import write_adapter
from ftjax.weights.write import write_merged


def export_peft(config: ConfigDict, base: Base, variables: Tree, out: Path) -> None:
    """The adapter alone. Raises UserError for a run that trained the base itself."""
    if "lora" not in variables:
        raise UserError("this run has no adapter (config.adapter.kind='none'); use --format merged")
    adapter = config.adapter
    _, matrices = tree.partition(variables["lora"], lambda path: path.endswith("/lora_scale"))
    write_adapter(out, matrices, base.model.spec, adapter.rank, adapter.alpha, adapter.rslora, base_name=base.source)


def export_merged(base: Base, variables: Tree, out: Path) -> None:
    """The base with the adapter merged into it (or as it was trained), in the run's parameter dtype."""
    merged = lora.merge(variables["params"], variables["lora"]) if "lora" in variables else variables["params"]
    write_merged(
        out, merged, base.model.spec, base.reader.config, base.tokenizer.save_pretrained, dtype=base.model.param_dtype
    )


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --")
    if not (FLAGS.workdir and FLAGS.out and FLAGS.format):
        raise UserError("give --workdir (a run), --format (peft or merged) and --out (a directory to make)")
    out = Path(FLAGS.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists; name another --out or remove it")  # before minutes of loading
    config, base, variables, step = assemble.load_run(Path(FLAGS.workdir), FLAGS.step)
    if FLAGS.format == "peft":
        export_peft(config, base, variables, out)
    else:
        export_merged(base, variables, out)
    print(f"step {step} of {FLAGS.workdir} is in {out}")
    return 0


if __name__ == "__main__":
    sys.argv[0] = "ftjax.export"  # absl shows in --help the flags defined under this name
    FLAGS = flags.FLAGS
    flags.DEFINE_string("workdir", None, "a run of ftjax.train")
    flags.DEFINE_enum("format", None, ["peft", "merged"], "what to write")
    flags.DEFINE_string("out", None, "the directory to make")
    flags.DEFINE_integer("step", None, "the run's checkpoint to use (default: the newest)")
    cli.run(main)
