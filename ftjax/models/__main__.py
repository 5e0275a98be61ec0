"""Which models there are, and which formats each is read from and written as.

    python -m ftjax.models              every model_type
    python -m ftjax.models MODEL        one model: a Hugging Face id, a directory, a .gguf file or package:NAME

Of a model its config is read, no weights. One that is not supported is refused with what it resembles most, and what in
its config is different.

Exit status: 0, 2 a model that is not supported.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

from ftjax import cli
from ftjax.models.families import FAMILIES, family_of, spec_from_config
from ftjax.models.groups import stacks
from ftjax.weights.gguf.config import ARCHITECTURES
from ftjax.weights.hf.classifier import TEXTS, TOKENS, is_there
from ftjax.weights.source import locate, open_source


class Formats(NamedTuple):
    """Of one model_type."""

    read: tuple[str, ...]
    written: tuple[str, ...]
    heads: tuple[str, ...]  # what a reward model or a classifier of it can be written for, in transformers


def formats(name: str) -> Formats:
    """The formats of a model_type; of a multimodal one what is written is its language model."""
    inner = FAMILIES[name].language_models
    text = inner[0] if inner else name
    known = [architecture for architecture in ARCHITECTURES.values() if text in architecture.families]
    written = ("GGUF",) if any(architecture.metadata for architecture in known) else ()
    packed = ("MXFP4",) if name == "gpt_oss" else ()
    heads = tuple(word for kind, word in ((TEXTS, "texts"), (TOKENS, "tokens")) if is_there(text, kind))
    read = ("GGUF",) if known and name != "qwen2_5_vl" else ()  # which llama.cpp knows by an architecture of its own
    return Formats(("safetensors", *packed, *read), ("safetensors", "PEFT", *written), heads)


def table() -> str:
    """A line for each model_type, in the order of the alphabet."""
    rows = [("model_type", "read from", "written as", "heads for")]
    for name in sorted(FAMILIES):
        rows.append((name, *(", ".join(words) or "-" for words in formats(name))))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(word.ljust(width) for word, width in zip(row, widths)).rstrip() for row in rows)


def described(source: str) -> str:
    """What is made of one model, in a few lines; UserError for one that is not supported."""
    config = open_source(locate(source, weights=False), weights=False).config
    name, spec = config.get("model_type"), spec_from_config(config)
    its, kinds = formats(name), {stack.spec.experts is not None for stack in stacks(spec)}
    mlp = {(False,): "dense", (True,): "mixtures"}.get(tuple(kinds), "mixtures and dense ones")
    return "\n".join(
        [
            f"{source}: {name}, as transformers' {family_of(config).architecture}",
            f"  {spec.num_hidden_layers} layers ({mlp}) of width {spec.hidden_size}, "
            f"{spec.num_attention_heads} heads over {spec.num_key_value_heads}, {spec.vocab_size} tokens",
            f"  read from {', '.join(its.read)}; written as {', '.join(its.written)}",
            *(["  reads images with config.model.vision=True"] if family_of(config).vision else []),
        ]
    )


def main(argv: Sequence[str]) -> int:
    about, _, examples = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "ftjax.models",
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", help="a model whose config is looked at (default: all that are supported)")
    args = parser.parse_args(argv)
    with cli.piped():
        print(table() if args.model is None else described(args.model))
    return 0


if __name__ == "__main__":
    cli.exit_with(lambda: main(sys.argv[1:]))
