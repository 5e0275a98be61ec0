"""Every architecture there is: from a Hugging Face `config.json` to a DecoderSpec, and its names for our parameters."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ftjax.errors import UserError
from ftjax.models.families import (
    apertus,
    arcee,
    cohere,
    deepseek,
    ernie,
    exaone,
    falcon,
    gemma,
    gemma3n,
    gemma4,
    glm,
    gpt2,
    gpt_oss,
    granite,
    helium,
    hunyuan,
    lfm2,
    llama,
    llama4,
    minimax,
    mistral,
    nemotron,
    nemotron_h,
    olmo,
    olmo2,
    olmo3,
    phi,
    phi3,
    phimoe,
    qwen,
    qwen2_5_vl,
    qwen_next,
    seed_oss,
    siglip,
    stablelm,
    starcoder2,
)
from ftjax.models.families.fields import object_of, shorten
from ftjax.models.families.likeness import likeness
from ftjax.models.spec import DecoderSpec, Experts, Vision


class VisionPart(NamedTuple):
    """The vision tower of a multimodal `model_type`. Names are those that transformers' module has, which peft knows,
    too: the tower's and, below "model.language_model.", the language model's, here without "language_model.".
    """

    spec: Callable[[dict[str, Any]], Vision]
    names: Mapping[str, str]  # as Family.names
    read_as: tuple[tuple[str, str], ...]  # as Family.read_as
    written_as: tuple[tuple[str, str], ...]  # (prefix of those names, what files that transformers writes have)
    sections: Callable[[dict[str, Any]], tuple[int, ...]] | None = None  # as Rope.sections


class Family(NamedTuple):
    """One `model_type`. Names are only needed where they differ from Llama's (see weights/keys.py)."""

    spec: Callable[[dict[str, Any]], DecoderSpec]
    architecture: str  # for `architectures` of a config.json that we make
    names: Mapping[str, str] = {}  # {our path: Hugging Face name, with {} for the layer and for the expert}
    as_stored: tuple[str, ...] = ()  # paths of kernels that Hugging Face stores as [in, out], like ours
    read_as: tuple[tuple[str, str], ...] = ()  # (prefix in some files, what it stands for)
    ignored: str | None = None  # a regular expression for tensors in the files that the decoder has no use for
    language_models: tuple[str, ...] = ()  # of a multimodal model: `model_type`s that its `text_config` may have
    alone: bool = False  # transformers' AutoModelForCausalLM of a multimodal model is its language model alone
    text: Callable[[dict[str, Any]], dict[str, Any]] | None = None  # the language model's config, if not `text_config`
    vision: VisionPart | None = None  # of a multimodal model whose tower is ported


# The language model inside multimodal checkpoints, old and new; vision tensors are left where they are.
_INSIDE = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
_SENSES = r"^model\.(vision_tower|embed_vision|audio_tower|embed_audio)\."
_VISION = r"^(model\.)?(vision_tower|vision_model|multi_modal_projector)\."

FAMILIES: dict[str, Family] = {
    "apertus": Family(apertus.apertus, "ApertusForCausalLM", apertus.NAMES),
    "arcee": Family(arcee.arcee, "ArceeForCausalLM"),
    "cohere2": Family(cohere.cohere2, "Cohere2ForCausalLM"),
    "deepseek_v2": Family(deepseek.deepseek_v2, "DeepseekV2ForCausalLM", deepseek.NAMES),
    "deepseek_v3": Family(deepseek.deepseek_v3, "DeepseekV3ForCausalLM", deepseek.NAMES),
    "ernie4_5": Family(ernie.ernie4_5, "Ernie4_5ForCausalLM"),
    "ernie4_5_moe": Family(ernie.ernie4_5_moe, "Ernie4_5_MoeForCausalLM", ernie.MOE_NAMES, ignored=ernie.IGNORED),
    "exaone4": Family(exaone.exaone4, "Exaone4ForCausalLM"),
    "falcon_h1": Family(falcon.falcon_h1, "FalconH1ForCausalLM", falcon.NAMES),
    "gemma2": Family(gemma.gemma2, "Gemma2ForCausalLM"),
    "gemma3": Family(
        gemma.gemma3,
        "Gemma3ForConditionalGeneration",
        read_as=_INSIDE,
        ignored=_VISION,
        language_models=("gemma3_text",),
        vision=VisionPart(siglip.gemma3_vision, siglip.NAMES, siglip.READ_AS, siglip.WRITTEN_AS),
    ),
    "gemma3_text": Family(gemma.gemma3, "Gemma3ForCausalLM"),
    "gemma3n": Family(
        gemma3n.gemma3n,
        "Gemma3nForConditionalGeneration",
        read_as=_INSIDE,
        ignored=_SENSES,
        language_models=("gemma3n_text",),
    ),
    "gemma3n_text": Family(gemma3n.gemma3n, "Gemma3nForCausalLM", gemma3n.NAMES),
    "gemma4": Family(
        gemma4.gemma4,
        "Gemma4ForConditionalGeneration",
        read_as=_INSIDE,
        ignored=_SENSES,
        language_models=("gemma4_text",),
    ),
    "gemma4_text": Family(gemma4.gemma4, "Gemma4ForCausalLM", gemma4.NAMES),
    "glm": Family(glm.glm, "GlmForCausalLM"),
    "glm4": Family(glm.glm, "Glm4ForCausalLM", glm.GLM4_NAMES),
    "glm4_moe": Family(glm.glm4_moe, "Glm4MoeForCausalLM", deepseek.NAMES),
    "glm4_moe_lite": Family(glm.glm4_moe_lite, "Glm4MoeLiteForCausalLM", deepseek.NAMES),
    "gpt2": Family(gpt2.gpt2, "GPT2LMHeadModel", gpt2.NAMES, gpt2.AS_STORED, gpt2.READ_AS, gpt2.IGNORED),
    "gpt_oss": Family(gpt_oss.gpt_oss, "GptOssForCausalLM", gpt_oss.NAMES, gpt_oss.AS_STORED),
    "granite": Family(granite.granite, "GraniteForCausalLM"),
    "granitemoe": Family(granite.granitemoe, "GraniteMoeForCausalLM", granite.MOE_NAMES),
    "granitemoehybrid": Family(granite.granitemoehybrid, "GraniteMoeHybridForCausalLM", granite.HYBRID_NAMES),
    "helium": Family(helium.helium, "HeliumForCausalLM"),
    "hunyuan_v1_dense": Family(hunyuan.hunyuan, "HunYuanDenseV1ForCausalLM", hunyuan.NAMES),
    "hunyuan_v1_moe": Family(hunyuan.hunyuan_moe, "HunYuanMoEV1ForCausalLM", hunyuan.MOE_NAMES),
    "lfm2": Family(lfm2.lfm2, "Lfm2ForCausalLM", lfm2.NAMES),
    "llama": Family(llama.llama, "LlamaForCausalLM"),
    "llama4": Family(
        llama4.llama4,
        "Llama4ForConditionalGeneration",
        read_as=_INSIDE,
        ignored=_VISION,
        language_models=("llama4_text",),
        alone=True,
    ),
    "llama4_text": Family(llama4.llama4, "Llama4ForCausalLM", llama4.NAMES, llama4.AS_STORED),
    "minimax_m2": Family(minimax.minimax_m2, "MiniMaxM2ForCausalLM", minimax.NAMES),
    "ministral": Family(mistral.ministral, "MinistralForCausalLM"),
    "ministral3": Family(mistral.ministral3, "Ministral3ForCausalLM"),
    "mistral": Family(mistral.mistral, "MistralForCausalLM"),
    "mistral3": Family(
        mistral.mistral,
        "Mistral3ForConditionalGeneration",
        read_as=_INSIDE,
        ignored=_VISION,
        language_models=("mistral", "ministral3"),
    ),
    "mixtral": Family(mistral.mixtral, "MixtralForCausalLM", mistral.MIXTRAL_NAMES),
    "nemotron": Family(nemotron.nemotron, "NemotronForCausalLM"),
    "nemotron_h": Family(
        nemotron_h.nemotron_h,
        "NemotronHForCausalLM",
        nemotron_h.NAMES,
        read_as=(("model.", "backbone."),),
        ignored=nemotron_h.IGNORED,
    ),
    "olmo": Family(olmo.olmo, "OlmoForCausalLM"),
    "olmo2": Family(olmo2.olmo2, "Olmo2ForCausalLM"),
    "olmo3": Family(olmo3.olmo3, "Olmo3ForCausalLM"),
    "phi": Family(phi.phi, "PhiForCausalLM", phi.NAMES),
    "phi3": Family(phi3.phi3, "Phi3ForCausalLM"),
    "phimoe": Family(phimoe.phimoe, "PhimoeForCausalLM", mistral.MIXTRAL_NAMES),
    "qwen2": Family(qwen.qwen2, "Qwen2ForCausalLM"),
    "qwen2_5_vl": Family(
        qwen.qwen2,
        "Qwen2_5_VLForConditionalGeneration",
        read_as=_INSIDE,
        ignored=r"^(model\.)?visual\.",
        language_models=("qwen2",),
        text=qwen2_5_vl.language_model,
        vision=VisionPart(
            qwen2_5_vl.qwen2_5_vision,
            qwen2_5_vl.NAMES,
            qwen2_5_vl.READ_AS,
            qwen2_5_vl.WRITTEN_AS,
            qwen2_5_vl.mrope_sections,
        ),
    ),
    "qwen2_moe": Family(qwen.qwen2_moe, "Qwen2MoeForCausalLM", qwen.MOE_NAMES),
    "qwen3": Family(qwen.qwen3, "Qwen3ForCausalLM"),
    "qwen3_moe": Family(qwen.qwen3_moe, "Qwen3MoeForCausalLM", qwen.MOE_NAMES),
    "qwen3_5": Family(
        qwen_next.qwen3_5,
        "Qwen3_5ForConditionalGeneration",
        read_as=_INSIDE,
        ignored=qwen_next.IGNORED,
        language_models=("qwen3_5_text",),
        alone=True,
    ),
    "qwen3_5_moe": Family(
        qwen_next.qwen3_5_moe,
        "Qwen3_5MoeForConditionalGeneration",
        qwen.MOE_NAMES,
        read_as=_INSIDE,
        ignored=qwen_next.IGNORED,
        language_models=("qwen3_5_moe_text",),
        alone=True,
    ),
    "qwen3_5_moe_text": Family(
        qwen_next.qwen3_5_moe, "Qwen3_5MoeForCausalLM", qwen.MOE_NAMES, ignored=qwen_next.IGNORED
    ),
    "qwen3_5_text": Family(qwen_next.qwen3_5, "Qwen3_5ForCausalLM", ignored=qwen_next.IGNORED),
    "qwen3_next": Family(qwen_next.qwen3_next, "Qwen3NextForCausalLM", qwen.MOE_NAMES, ignored=qwen_next.IGNORED),
    "seed_oss": Family(seed_oss.seed_oss, "SeedOssForCausalLM"),
    "smollm3": Family(llama.smollm3, "SmolLM3ForCausalLM"),
    "stablelm": Family(stablelm.stablelm, "StableLmForCausalLM", stablelm.NAMES),
    "starcoder2": Family(starcoder2.starcoder2, "Starcoder2ForCausalLM", starcoder2.NAMES),
}


def family_of(config: dict[str, Any]) -> Family:
    """Raises UserError for an architecture that is not there, with what is, and what its config resembles most."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        specs = {name: family.spec for name, family in FAMILIES.items() if not family.language_models}
        raise UserError(
            f"no port of model_type {shorten(name)}{likeness(config, specs)}; there are: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[name]


def is_multimodal(config: dict[str, Any]) -> bool:
    return bool(family_of(config).language_models)


def is_inside(config: dict[str, Any], whole: bool = False) -> bool:
    """Whether the language model is inside a multimodal one, in what transformers' AutoModelForCausalLM loads.

    whole: in what AutoModelForSequenceClassification and vLLM load, which is never the language model alone.
    """
    return is_multimodal(config) and (whole or not family_of(config).alone)


def inside_multimodal(spec: DecoderSpec) -> bool:
    """Whether this may be the language model inside a multimodal one."""
    return any(spec.family in family.language_models for family in FAMILIES.values())


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the language model alone: of a multimodal model its `text_config`, else `config` itself.

    The multimodal model's own word on token ids and tied embeddings counts. The language model is of the first of the
    family's `language_models` unless its config says another.
    """
    if not is_multimodal(config):
        return config
    family = family_of(config)
    inner, names = family.text(config) if family.text else object_of(config, "text_config"), family.language_models
    name = inner.get("model_type") or names[0]
    if name not in names:
        raise UserError(
            f"config.json of a {config['model_type']!r} model: no port of a language model {shorten(name)} in it, "
            f"only of {', '.join(names)}"
        )
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    tied = {key: config[key] for key in ("tie_word_embeddings",) if config.get(key) is not None}
    return ids | inner | tied | {"model_type": name, "architectures": [FAMILIES[name].architecture]}


def spec_from_config(config: dict[str, Any], vision: bool = False) -> DecoderSpec:
    """Raises UserError, by name, for an architecture or an option that is not ported, and for missing or odd sizes.

    vision: with the tower of a multimodal model, which else is its language model alone.
    """
    if vision:
        return _with_vision(spec_from_config(config), config)
    config = text_config(config)
    spec = family_of(config).spec(config)
    if spec.num_attention_heads % spec.num_key_value_heads:
        raise UserError(
            f"config.json: num_attention_heads={spec.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={spec.num_key_value_heads}"
        )
    if spec.experts and spec.experts.per_token > spec.experts.count:
        raise UserError(f"config.json: {spec.experts.per_token} experts per token of only {spec.experts.count}")
    if spec.experts and spec.experts.groups and not _chosen_in_groups(spec.experts):
        raise UserError(
            f"config.json: {spec.experts.per_token} experts per token, in {spec.experts.groups[1]} of "
            f"{spec.experts.groups[0]} groups of {spec.experts.count} experts, do not go"
        )
    if spec.experts and spec.hidden_act == "xielu":
        raise UserError("config.json: hidden_act='xielu' has scalars that are learned, which experts have not here")
    return spec


def _with_vision(spec: DecoderSpec, config: dict[str, Any]) -> DecoderSpec:
    part = family_of(config).vision
    if part is None:
        with_it = [name for name, family in sorted(FAMILIES.items()) if family.vision]
        raise UserError(
            f"no port of a vision tower of model_type {config['model_type']!r}, only of {', '.join(with_it)}; "
            "set config.model.vision=False"
        )
    if part.sections is not None:
        sections = part.sections(config)
        if sum(sections) != len(spec.ropes[0].frequencies):
            raise UserError(
                f"config.json: mrope_section={list(sections)} is not of heads of {spec.head_dim} dimensions"
            )
        spec = dataclasses.replace(spec, ropes=tuple(dataclasses.replace(x, sections=sections) for x in spec.ropes))
    return dataclasses.replace(spec, vision=part.spec(config))


def _chosen_in_groups(experts: Experts) -> bool:
    """Whether a router's groups can be made and hold as many experts as a token has."""
    groups, used = experts.groups
    least = 2 if experts.group_score == "top2" else 1
    return (
        experts.count % groups == 0
        and used <= groups
        and least <= experts.count // groups
        and experts.per_token <= experts.count // groups * used
    )
