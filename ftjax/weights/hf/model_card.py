"""The README.md of an export, from the template model_card.md: Hub metadata, use, training, evaluation."""

import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from ml_collections import ConfigDict

from ftjax import config as configs

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TEMPLATE = Path(__file__).with_name("model_card.md")


def model_card(
    name: str,
    library: str,
    config: ConfigDict,
    step: int,
    base: Path,
    evaluation: Mapping[str, float],
    parity: Mapping[str, Any] | None = None,
    ends: Sequence[str] = (),
) -> str:
    """Markdown with YAML front matter as the Hub reads it.

    library: "transformers" or "peft". config: as it was used, so with the learning rate where it leaves that to the
    method. base: where the base model is; its own card, if it has one, gives the license, and nothing else does.
    evaluation: the last `eval_*` metrics of the run. parity: `parity.json`, where there is one. ends: end tokens that
    the base of an adapter does not name, but the generation_config.json beside it.
    """
    source, sources = config.model.source, configs.sources(config, "train")
    notes = list((parity or {}).get("notes", ()))
    if library == "peft" and config.quantize.base != "none":
        notes.append(
            f"The adapter was trained beside the base stored as {config.quantize.base}. Beside the base in another "
            "precision it gives somewhat different results."
        )
    hub_data = {entry["source"].removeprefix("hf:") for entry in sources if entry["source"].startswith("hf:")}
    card_data = ModelCardData(
        base_model=source if _on_hub(source) else None,
        library_name=library,
        pipeline_tag="text-generation",
        **base_license(base),
        datasets=sorted(hub_data) or None,
        tags=["ftjax", config.objective.name, *([config.adapter.kind] if config.adapter.kind != "none" else [])],
    )
    options = ["".join(f", {key} {value}" for key, value in entry.items() if key != "source") for entry in sources]
    card = ModelCard.from_template(
        card_data,
        template_path=_TEMPLATE,
        title=name,
        base_name=shown(source),
        base_link=f"[{source}](https://huggingface.co/{source})" if _on_hub(source) else f"`{shown(source)}`",
        version=metadata.version("ftjax"),
        method=_method(config),
        notes=notes,
        config=config,
        sources=[(shown(entry["source"]), text) for entry, text in zip(sources, options)],
        step=step,
        learning_rate=config.optimizer.learning_rate,
        evaluation=evaluation,
        parity=parity,
        ends=ends,
    )
    return str(card).rstrip() + "\n"


def base_license(base: Path) -> dict[str, str]:
    """{"license"?, "license_name"?, "license_link"?} as the front matter of the base's own README.md says them."""
    file = base / "README.md"
    try:
        front_matter = (metadata_load(file) if base.is_dir() and file.is_file() else None) or {}
    except (ValueError, yaml.YAMLError, RecursionError):  # a damaged card says nothing that could be relied on
        return {}
    licenses = {key: front_matter.get(key) for key in ("license", "license_name", "license_link")}
    return {key: value for key, value in licenses.items() if isinstance(value, str)}


def _method(config: ConfigDict) -> str:
    adapter = config.adapter
    if adapter.kind == "none":
        which = "all parameters" if adapter.trainable == ".*" else f"the parameters matching `{adapter.trainable}`"
        return f"{config.objective.name.upper()} of {which}"
    kind = {"lora": "LoRA", "dora": "DoRA"}[adapter.kind]
    scaled = ", rank-stabilized" if adapter.rslora else ""
    return f"{config.objective.name.upper()} with {kind} (rank {adapter.rank}, alpha {adapter.alpha:g}{scaled})"


def _on_hub(source: str) -> bool:
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).exists()


def shown(source: str) -> str:
    """The source as it may be published: only the last part of a path on somebody's disk."""
    if ":" in source or _on_hub(source):
        return source
    return Path(source).name
