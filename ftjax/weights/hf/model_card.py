"""The README.md of what is exported: Hub metadata, how it was made, what it reached, how to load it."""

import json
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ftjax import config as configs

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LICENSE = re.compile(r"^(license|license_name|license_link):[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
_USES = {
    "transformers": """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({here})
model = AutoModelForCausalLM.from_pretrained({here}, dtype="auto")
""",
    "peft": """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({base})
model = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(model, {here})
""",
}


def model_card(
    name: str,
    library: str,
    config: ConfigDict,
    step: int,
    base: Path,
    evaluation: Mapping[str, float],
    parity: Mapping[str, Any] | None = None,
) -> str:
    """Markdown with YAML front matter as the Hub reads it.

    library: "transformers" or "peft". base: where the base model is; its own card, if it has one, gives the license,
    and nothing else does. evaluation: the last `eval_*` metrics of the run. parity: `parity.json`, where there is one.
    """
    source = config.model.source
    method = _method(config)
    base_name = f"[{source}](https://huggingface.co/{source})" if _on_hub(source) else f"`{shown(source)}`"
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in _metadata(library, config, base)) + "---",
        f"# {name}",
        f"{base_name}, fine-tuned with ftjax {metadata.version('ftjax')}: {method}.",
        *_quantized(library, config),
        *((parity or {}).get("notes", ())),
        "## Use",
        "```python\n" + _USES[library].format(here=json.dumps("PATH_OR_ID"), base=json.dumps(shown(source))) + "```",
        "## Training",
        _table(_training(config, step, method)),
        "## Evaluation",
        _table((key.removeprefix("eval_"), f"{value:.4g}") for key, value in evaluation.items())
        if evaluation
        else "This run was not evaluated on held-out data.",
    ]
    if parity is not None:
        parts += ["## What was written, against the run", _parity(parity)]
    return "\n\n".join(parts) + "\n"


def base_license(base: Path) -> dict[str, str]:
    """{"license"?, "license_name"?, "license_link"?} as the front matter of the base's own README.md says them."""
    card = base / "README.md"
    if not base.is_dir() or not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace")
    found = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    return {key: value.strip("'\"") for key, value in _LICENSE.findall(found[1])} if found else {}


def _metadata(library: str, config: ConfigDict, base: Path) -> Iterable[tuple[str, Any]]:
    if _on_hub(config.model.source):
        yield "base_model", config.model.source
    yield "library_name", library
    yield "pipeline_tag", "text-generation"
    yield from base_license(base).items()
    datasets = {entry["source"].removeprefix("hf:") for entry in configs.sources(config, "train")
                if entry["source"].startswith("hf:")}  # fmt: skip
    if datasets:
        yield "datasets", sorted(datasets)
    adapted = [config.adapter.kind] if config.adapter.kind != "none" else []
    yield "tags", ["ftjax", config.objective.name, *adapted]


def _method(config: ConfigDict) -> str:
    adapter = config.adapter
    if adapter.kind == "none":
        which = "all parameters" if adapter.trainable == ".*" else f"the parameters matching `{adapter.trainable}`"
        return f"{config.objective.name.upper()} of {which}"
    kind = {"lora": "LoRA", "dora": "DoRA"}[adapter.kind]
    scaled = ", rank-stabilized" if adapter.rslora else ""
    return f"{config.objective.name.upper()} with {kind} (rank {adapter.rank}, alpha {adapter.alpha:g}{scaled})"


def _training(config: ConfigDict, step: int, method: str) -> Iterable[tuple[str, str]]:
    data, schedule = config.data, config.schedule
    yield "method", method
    if config.adapter.kind != "none":
        yield "adapted layers", f"`{config.adapter.targets}`"
    for entry in configs.sources(config, "train"):
        options = "".join(f", {key} {value}" for key, value in entry.items() if key != "source")
        yield "data", f"`{shown(entry['source'])}`{options}"
    yield "steps", str(step)
    packed = "packed" if data.packing else "not packed"
    yield "batch", f"{data.batch_size} rows of up to {data.max_length} tokens, {packed}"
    rate = configs.learning_rate(config)
    yield "learning rate", f"{rate:g}, {schedule.name}, warm-up over {schedule.warmup_ratio:.0%} of the steps"
    optimizer = config.optimizer
    yield (
        "optimizer",
        (
            f"{optimizer.name}, betas {optimizer.b1:g} and {optimizer.b2:g}, weight decay {optimizer.weight_decay:g}, "
            f"gradient norm clipped at {optimizer.clip_norm:g}"
        ),
    )
    packed = f", kernels of the base in {config.quantize.base}" if config.quantize.base != "none" else ""
    yield "precision", f"computed in {config.model.dtype}, frozen parameters in {config.model.param_dtype}{packed}"
    yield "seed", str(config.seed)


def _parity(parity: Mapping[str, Any]) -> str:
    rows = [
        ("stored as", parity["stored_as"]),
        ("largest logit difference", f"{parity['max_abs_logit_difference']:.3g}"),
        ("mean logit difference", f"{parity['mean_abs_logit_difference']:.3g}"),
        ("mean KL divergence", f"{parity['mean_kl']:.3g} nats"),
        ("same likeliest token", f"{parity['top1_agreement']:.1%}"),
    ]
    return (
        f"These files, read again, on {len(parity['prompts'])} prompts ({parity['positions']} tokens) in float32, "
        f"compared with the model as it was trained; `parity.json` has the prompts and versions.\n\n{_table(rows)}"
    )


def _quantized(library: str, config: ConfigDict) -> Iterable[str]:
    if library == "peft" and config.quantize.base != "none":
        yield (
            f"The adapter was trained beside the base stored as {config.quantize.base}. Beside the base in another "
            "precision it gives somewhat other results."
        )


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _on_hub(source: str) -> bool:
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).exists()


def shown(source: str) -> str:
    """As it may be published: of a path on somebody's disk the last part."""
    if ":" in source or _on_hub(source):
        return source
    return Path(source).name
