"""Whether a format can hold a run's result: asked before the first step, and before an export reads the weights."""

import dataclasses
from typing import Any

import jax
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from ftjax import assemble, tree
from ftjax.assemble import Base
from ftjax.errors import UserError
from ftjax.models.spec import DecoderSpec
from ftjax.tree import Tree
from ftjax.weights.gguf.tokenizer import from_metadata
from ftjax.weights.gguf.tokenizer_write import check_same, to_metadata
from ftjax.weights.gguf.write import gguf_header
from ftjax.weights.hf.end_tokens import with_end_of_turn, with_ends
from ftjax.weights.peft.adapter import refuse_experts
from ftjax.weights.peft.vllm import uniform


def check_peft(config: ConfigDict, base: Base, variables: Tree, vllm_rank: int | None = None) -> None:
    """UserError for a run that has no adapter, or one that peft has no words for.

    variables: shapes suffice. vllm_rank: the largest rank of the vLLM that is to read it; None: it is for peft.
    """
    _refuse_heads(variables, "peft")
    if "lora" not in variables:
        raise UserError("this run has no adapter (config.adapter.kind='none'); use --format hf")
    whole = assemble.trained_whole(config, base)
    refuse_experts([*tree.by_module(variables["lora"]), *whole])
    if vllm_rank is not None:
        jax.eval_shape(lambda adapters: uniform(adapters, whole, vllm_rank), variables["lora"])


def check_model(format: str, base: Base, variables: Tree) -> dict[str, Any]:
    """The metadata of the tokenizer for a GGUF, {} for other formats ("merged", "hf").

    UserError for a run without an adapter to merge; for a decoder or a tokenizer that a GGUF file has no words for.
    """
    _refuse_heads(variables, format)
    if format == "merged" and "lora" not in variables:
        raise UserError("this run has no adapter to merge (config.adapter.kind='none'); use --format hf")
    if format != "gguf":
        return {}
    config = gguf_config(base, written_spec(base, variables))
    architecture, *_ = gguf_header(written_spec(base, variables), config)
    metadata = to_metadata(written_tokenizer(base), config)
    check_same(from_metadata(base.path, metadata | {"general.architecture": architecture}), base.tokenizer)
    return metadata


def check(formats: tuple[str, ...], config: ConfigDict, base: Base, variables: Tree) -> None:
    """UserError where the result of a run cannot be exported to one of config.export_formats."""
    for format in formats:
        try:
            check_peft(config, base, variables) if format == "peft" else check_model(format, base, variables)
        except UserError as error:
            raise UserError(f"config.export_formats: {format!r} would be refused at the end: {error}") from error


def must_untie(spec: DecoderSpec, variables: Tree) -> bool:
    """Whether the embedding and the head, one matrix in the base, are two once the adapter is merged."""
    return spec.tie_word_embeddings and "embed_tokens" in variables.get("lora", {})


def written_spec(base: Base, variables: Tree) -> DecoderSpec:
    """The spec of the merged model."""
    spec = base.model.spec
    return dataclasses.replace(spec, tie_word_embeddings=False) if must_untie(spec, variables) else spec


def model_config(base: Base) -> dict[str, Any]:
    """The config.json of the merged model, with all tokens at which the run stops."""
    return with_ends(base.reader.config, base.end_tokens)


def gguf_config(base: Base, spec: DecoderSpec) -> dict[str, Any]:
    """What the header of a GGUF is made of."""
    return model_config(base) | {"tie_word_embeddings": spec.tie_word_embeddings, "vocab_size": spec.vocab_size}


def written_tokenizer(base: Base) -> PreTrainedTokenizerFast:
    """The run's tokenizer, whose end-of-sequence token ends a turn."""
    return with_end_of_turn(base.tokenizer, base.reader.config, base.end_tokens)


def _refuse_heads(variables: Tree, format: str) -> None:
    """UserError for a run with parameters that no format can hold: an export never drops any silently."""
    written = {"params", "lora", "quant"}
    if heads := list(tree.flatten({name: part for name, part in variables.items() if name not in written})):
        raise UserError(
            f"this run has a head ({', '.join(heads)}), which --format {format} cannot hold, nor can any other format; "
            "use the run itself (--workdir), whose checkpoints hold it"
        )
