"""Whether a format can hold a run's result: asked before the first step, and before an export reads the weights."""

import dataclasses
from typing import Any

import jax
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from ftjax import assemble, lora, tree
from ftjax.assemble import Base
from ftjax.errors import UserError
from ftjax.method import method_of
from ftjax.models.families import is_multimodal
from ftjax.models.heads import COLLECTION, SCORE
from ftjax.models.spec import DecoderSpec
from ftjax.objectives.reward import REWARDS
from ftjax.training.state import normalization
from ftjax.tree import Tree
from ftjax.weights.gguf.tokenizer import from_metadata
from ftjax.weights.gguf.tokenizer_write import check_same, to_metadata
from ftjax.weights.gguf.write import gguf_header
from ftjax.weights.hf.classifier import TEXTS, TOKENS, Head, architecture, is_there
from ftjax.weights.hf.end_tokens import with_end_of_turn, with_ends
from ftjax.weights.hf.padding import padding_token
from ftjax.weights.peft import continued
from ftjax.weights.peft.expert_adapters import check_scales
from ftjax.weights.peft.keys import refuse_fused, refuse_saved
from ftjax.weights.peft.vllm import uniform


def check_peft(config: ConfigDict, base: Base, variables: Tree, vllm_rank: int | None = None) -> None:
    """UserError for a run that has no adapter, or one that peft has no words for.

    variables: shapes suffice. vllm_rank: the largest rank of the vLLM that is to read it; None: it is for peft.
    """
    _check_heads(config, base, variables, "peft")
    if "lora" not in variables:
        raise UserError("this run has no adapter (config.adapter.kind='none'); use --format hf")
    whole = assemble.trained_whole(config, base)
    refuse_saved(whole)
    modules = tree.by_module(variables["lora"])
    refuse_fused(modules, base.model.spec)
    if not config.adapter.source:  # else they are those of the directory, of which peft has one for gate and up
        ranks = {continued.path_of(module): parts["lora_a"].shape[-1] for module, parts in modules.items()}
        alphas = lora.by_pattern(
            config.adapter.alpha, config.adapter.alpha_pattern, list(ranks), "adapter.alpha_pattern"
        )
        scales = {path: lora.scale(rank, alphas[path], config.adapter.rslora) for path, rank in ranks.items()}
        check_scales({path.rpartition("/")[0]: scale for path, scale in scales.items()}, base.model.spec)
    if vllm_rank is not None and any(module.startswith("vision/") for module in modules):
        raise UserError("--vllm: vLLM has no adapters of a vision tower; leave --vllm out, or merge it")
    if vllm_rank is not None and COLLECTION in variables:
        raise UserError("--vllm: vLLM has no adapters of reward models and classifiers; leave --vllm out, or merge it")
    if vllm_rank is not None:
        jax.eval_shape(lambda adapters: uniform(adapters, whole, vllm_rank), variables["lora"])


def check_model(format: str, config: ConfigDict, base: Base, variables: Tree) -> dict[str, Any]:
    """The metadata of the tokenizer for a GGUF, {} for other formats ("merged", "hf").

    UserError for a run without an adapter to merge; for a decoder or a tokenizer that a GGUF file has no words for.
    """
    _check_heads(config, base, variables, format)
    if format == "merged" and "lora" not in variables:
        raise UserError("this run has no adapter to merge (config.adapter.kind='none'); use --format hf")
    if format != "gguf":
        return {}
    if base.model.spec.vision is not None:
        raise UserError(
            "this run's model has a vision tower (config.model.vision=True), for which its GGUF has no words; use "
            "--format hf (or merged, or peft), and llama.cpp's converter"
        )
    header = gguf_config(base, written_spec(base, variables))
    name, *_ = gguf_header(written_spec(base, variables), header)
    metadata = to_metadata(written_tokenizer(base), header)
    check_same(from_metadata(base.path, metadata | {"general.architecture": name}), base.tokenizer)
    return metadata


def check(formats: tuple[str, ...], config: ConfigDict, base: Base, variables: Tree) -> None:
    """UserError where the result of a run cannot be exported to one of config.export_formats."""
    for format in formats:
        try:
            check_peft(config, base, variables) if format == "peft" else check_model(format, config, base, variables)
        except UserError as error:
            raise UserError(f"config.export_formats: {format!r} would be refused at the end: {error}") from error


def smallest(config: ConfigDict, base: Base, variables: Tree) -> str | None:
    """What a run is told to be taken out in: "peft" where that can hold its result, else "hf"; None: neither can."""
    for format in ("peft", "hf"):
        try:
            check((format,), config, base, variables)
        except UserError:
            continue
        return format
    return None


def must_untie(spec: DecoderSpec, variables: Tree) -> bool:
    """Whether the embedding and the head, one matrix in the base, are two once the adapter is merged."""
    adapted = "embed_tokens" in variables.get("lora", {})
    return spec.tie_word_embeddings and adapted and COLLECTION not in variables


def written_spec(base: Base, variables: Tree) -> DecoderSpec:
    """The spec of the merged model; one with a head of numbers has none for tokens."""
    spec = base.model.spec
    if COLLECTION in variables:
        return dataclasses.replace(spec, tie_word_embeddings=True)
    return dataclasses.replace(spec, tie_word_embeddings=False) if must_untie(spec, variables) else spec


def model_config(base: Base) -> dict[str, Any]:
    """The config.json of the merged model, with all tokens at which the run stops."""
    return with_ends(base.reader.config, base.end_tokens, base.model.spec.vision is not None)


def gguf_config(base: Base, spec: DecoderSpec) -> dict[str, Any]:
    """What the header of a GGUF is made of."""
    return model_config(base) | {"tie_word_embeddings": spec.tie_word_embeddings, "vocab_size": spec.vocab_size}


def written_tokenizer(base: Base) -> PreTrainedTokenizerFast:
    """The run's tokenizer, whose end-of-sequence token ends a turn."""
    return with_end_of_turn(base.tokenizer, base.reader.config, base.end_tokens)


def head_of(config: ConfigDict, base: Base, variables: Tree) -> Head | None:
    """The head of a reward model or a classifier as it is written; None of any other run.

    variables: with what the run keeps ("kept"), of which a reward's normalization is made; shapes have none.
    """
    if COLLECTION not in variables:
        return None
    objective, kernel = config.objective, variables[COLLECTION][SCORE]["kernel"]
    facts = {"method": objective.name, "max_length": config.data.max_length}
    if REWARDS in variables.get("kept", {}):
        mean, std = normalization(variables["kept"])
        facts |= {"mean": mean.tolist(), "std": std.tolist(), "label_noise": objective.label_noise}
    count, of_tokens = kernel.shape[-1], _kind(config) == TOKENS
    rewards = ("reward",) if count == 1 else tuple(f"reward_{i}" for i in range(count))
    labels = ("wrong", "right") if of_tokens else tuple(objective.classes) or rewards
    pad = padding_token(base.tokenizer, base.end_tokens, base.model.spec.vocab_size)
    return Head(kernel, labels, of_tokens, pad, facts)


def without_token_head(tree: Tree, variables: Tree) -> Tree:
    """Parameters or adapters without those of the output head, where the run has a head of numbers instead."""
    return {name: part for name, part in tree.items() if COLLECTION not in variables or name != "lm_head"}


def _kind(config: ConfigDict) -> str:
    return TOKENS if method_of(config).rows == "stepwise" else TEXTS


def _check_heads(config: ConfigDict, base: Base, variables: Tree, format: str) -> None:
    """UserError for a run with parameters that the format cannot hold: an export never drops any silently."""
    written = {"params", "lora", "quant"}
    unknown = tree.flatten({name: part for name, part in variables.items() if name not in written})
    if not unknown:
        return
    if set(unknown) != {f"{COLLECTION}/{SCORE}/kernel"}:
        raise UserError(
            f"this run has a head ({', '.join(unknown)}), which --format {format} cannot hold, nor can any other "
            "format; use the run itself (--workdir), whose checkpoints hold it"
        )
    if format == "gguf":
        raise UserError(
            "this run has a head of numbers (heads/score), for which a GGUF has no words; use --format hf (or merged, "
            "or peft), or the run itself (--workdir)"
        )
    if base.model.spec.vision is not None:
        raise UserError(
            "this run has a head of numbers (heads/score) on a model with a vision tower (config.model.vision=True), "
            f"which --format {format} cannot hold, nor can any other format; use the run itself (--workdir)"
        )
    architecture(base.model.spec.family, _kind(config))
    whole, kind = base.reader.config["model_type"], _kind(config)
    if format == "peft" and is_multimodal(base.reader.config) and not is_there(whole, kind):
        raise UserError(
            f"transformers has no {kind} of the family {whole!r}, to which this adapter belongs; use --format merged "
            "(or hf), which writes the language model alone"
        )
