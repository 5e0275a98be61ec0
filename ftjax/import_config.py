"""A config of Axolotl's as one of ours.

    python -m ftjax.import_config axolotl.yml --out config.yaml
    python -m ftjax.import_config axolotl.yml --devices 8          as it is run on eight GPUs; printed

What is written is YAML that --config takes. What differs or was left out is told on stderr, with the reason; paths stay
relative to where you are. docs/from-axolotl.md has the settings side by side.

Exit status: 0 a config was written, 2 a mistake, or a config that ftjax has nothing like.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ftjax import cli, foreign
from ftjax import config as configs
from ftjax.atomic import write_text
from ftjax.data.read.files import COMPRESSIONS, FILE_KINDS
from ftjax.errors import UserError
from ftjax.method import METHODS

# Their settings whose values are ours as they are, under the key that `foreign.AXOLOTL` gives.
SAME = (
    "base_model", "lora_model_dir", "lora_r", "lora_alpha", "lora_dropout", "lora_modules_to_save", "peft_use_rslora",
    "loraplus_lr_ratio", "sequence_len", "sample_packing", "num_epochs", "max_steps", "learning_rate", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "cosine_min_lr_ratio", "warmup_ratio", "dpo_beta",
    "rl_beta", "kto_desirable_weight", "kto_undesirable_weight", "seed", "logging_steps", "save_total_limit",
    "tensor_parallel_size", "context_parallel_size", "expert_parallel_size", "dp_shard_size", "dp_replicate_size",
    "revision_of_model", "default_system_message", "tokens",
)  # fmt: skip
# Those that the functions below read.
READ = {
    "adapter", "load_in_4bit", "load_in_8bit", "peft_use_dora", "peft_init_lora_weights", "lora_target_linear",
    "lora_target_modules", "lora_rank_pattern", "lora_alpha_pattern", "bf16", "bfloat16", "fp16", "float16",
    "gradient_checkpointing", "activation_offloading", "datasets", "test_datasets", "val_set_size", "train_on_inputs",
    "micro_batch_size", "gradient_accumulation_steps", "batch_size", "optimizer", "lr_scheduler", "warmup_steps",
    "save_steps", "eval_steps", "rl", "output_dir", "chat_template", "chat_template_jinja",
    "peft_layers_to_transform", "evals_per_epoch", "early_stopping_patience",
}  # fmt: skip
# Settings in families, each with the member that `foreign.AXOLOTL` explains.
FAMILIES = {
    "wandb": "wandb_project", "mlflow": "wandb_project", "comet": "wandb_project", "trackio": "wandb_project",
    "use_": "wandb_project", "hub_": "hub_model_id", "flash": "flash_attention", "liger": "plugins", "fsdp": "fsdp",
    "torch_compile": "torch_compile", "swanlab": "wandb_project", "tokenizer": "tokenizer_type",
    "lora_mlp": "lora_mlp_kernel", "lora_qkv": "lora_mlp_kernel", "lora_o_": "lora_mlp_kernel",
    "dataset_": "dataset_prepared_path",
}  # fmt: skip
# Chat templates that have one name in both.
TEMPLATES = ("alpaca", "chatml", "gemma", "llama3")
# What Axolotl takes where a setting is left out, and ours is another.
DEFAULTS = {"sequence_len": 512, "sample_packing": False, "num_epochs": 1.0, "seed": 42}

OTHER_TRAININGS = ("pretraining_dataset", "relora", "ebft", "qat")
# Our methods for rows of which their configs say little.
REWARD_MODELS = {"reward_model": "reward", "process_reward_model": "prm"}


def imported(given: dict[str, Any], devices: int = 1) -> tuple[dict[str, Any], list[str]]:
    """({dotted key of ours: value}, what differs or was left out, in words) of an Axolotl config.

    devices: how many it is run on; Axolotl's batch is that of one of them.

    Raises:
      UserError: a value of the wrong type, or a kind of training that ftjax does not have.
    """
    if not given.get("base_model"):
        raise UserError("it has no base_model, so it is no config of Axolotl's; docs/from-trl.md is about TRL's")
    if other := [name for name in OTHER_TRAININGS if given.get(name)]:
        raise UserError(f"{other[0]}: ftjax has no training of that kind")
    if other := [name for name in REWARD_MODELS if given.get(name)]:
        method = REWARD_MODELS[other[0]]
        raise UserError(f"{other[0]}: is not translated; write a config with objective.name={method} (docs/methods.md)")
    if given.get("unfrozen_parameters"):  # left out, it would train other parameters
        raise UserError("unfrozen_parameters: has names of theirs; take it out, and set config.adapter.trainable then")
    notes: list[str] = []
    values: dict[str, Any] = {}
    for name in SAME:
        value = given.get(name, DEFAULTS.get(name))
        if value is None and name in DEFAULTS:
            value = DEFAULTS[name]
        if value not in (None, "", []):
            key = foreign.AXOLOTL[name].key
            values[key] = _as(key, name, value)
    for read in (_adapter, _precision, _data, _optimizer, _objective):
        values |= read(given, notes)
    values |= _batch(given, notes, devices)
    for name, value in given.items():
        if name not in SAME and name not in READ and value not in (None, False, "", [], {}):
            notes.append(f"{name}: left out: {_reason(name)}")
    return {key: values[key] for key in configs.KEYS if key in values}, notes


def _reason(name: str) -> str:
    family = next((member for start, member in FAMILIES.items() if name.startswith(start)), "")
    ours = foreign.AXOLOTL.get(name) or foreign.AXOLOTL.get(family)
    if ours is None:
        return "ftjax has nothing of that name"
    return f"see config.{ours.key} ({ours.note})" if ours.key else ours.note


def _as(key: str, name: str, value: Any) -> Any:
    """A value of theirs with the type of our key: 1e-4 is a string to Axolotl's YAML."""
    wanted = type(configs.KEYS[key].default)
    try:
        if wanted is tuple:
            return (value,) if isinstance(value, str) else tuple(value)
        if wanted is int and float(value) != int(float(value)):
            raise ValueError
        return int(float(value)) if wanted is int else wanted(value)
    except (TypeError, ValueError):
        raise UserError(f"{name}: {value!r} is no {wanted.__name__}, which config.{key} is") from None


def _adapter(given: dict, notes: list[str]) -> dict[str, Any]:
    kind = given.get("adapter")
    if not kind:
        if given.get("load_in_4bit") or given.get("load_in_8bit"):
            notes.append("load_in_4bit, load_in_8bit: left out: a model is trained whole only as it is stored")
        return {"adapter.kind": "none"}
    if kind not in ("lora", "qlora"):
        raise UserError(f"adapter: {kind!r} is none of ftjax's, which are LoRA and DoRA")
    values: dict[str, Any] = {"adapter.kind": "dora" if given.get("peft_use_dora") else "lora"}
    if kind == "qlora" or given.get("load_in_4bit"):
        values["quantize.base"] = "nf4"
    elif given.get("load_in_8bit"):
        values["quantize.base"] = "int8"
    names = given.get("lora_target_modules")
    if given.get("lora_target_linear") or names in (None, [], "all-linear"):
        values["adapter.targets"] = "all-linear"
    else:
        values["adapter.targets"] = names if isinstance(names, str) else ",".join(names)
    if layers := given.get("peft_layers_to_transform"):
        values["adapter.layers"] = ",".join(map(str, layers if isinstance(layers, list) else [layers]))
    init = given.get("peft_init_lora_weights", True)
    if init in ("pissa", "pissa_niter_4"):
        values["adapter.init"] = "pissa"
    elif init is not True:
        notes.append(f"peft_init_lora_weights: left out: {init!r} is neither peft's default nor pissa")
    for name in ("lora_rank_pattern", "lora_alpha_pattern"):
        pairs = given.get(name) or {}
        if all(re.fullmatch(r"\w+", pattern) for pattern in pairs):
            values |= {foreign.AXOLOTL[name].key: tuple(pairs.items())} if pairs else {}
        else:
            notes.append(f"{name}: left out: here patterns are found in paths such as layers/self_attn/q_proj/kernel")
    return values


def _precision(given: dict, notes: list[str]) -> dict[str, Any]:
    values = {}
    if given.get("fp16") or given.get("float16"):
        notes.append(f"fp16: left out: {foreign.AXOLOTL['fp16'].note}")
    elif given.get("bf16") is False and not given.get("bfloat16"):
        values = {"model.dtype": "float32", "model.param_dtype": "float32"}
    checkpointing = given.get("gradient_checkpointing")
    if given.get("activation_offloading") or str(checkpointing).startswith("offload"):
        values["model.remat"] = "offload"
    elif checkpointing is not None:
        values["model.remat"] = "full" if checkpointing else "none"
    template = given.get("chat_template_jinja") or given.get("chat_template")
    if template in TEMPLATES or (template and Path(template).is_file()):
        values["data.chat_template"] = template
    elif template not in (None, "tokenizer_default"):
        notes.append(f"chat_template: left out: {template!r} is unknown here; the model's own chat template is used")
    return values


def _data(given: dict, notes: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in ("datasets", "test_datasets"):
        entries = given.get(name) or []
        if not isinstance(entries, list):
            raise UserError(f"{name}: must be a list of data sets")
        format_of = _labeled_format if given.get("rl") == "kto" else _format
        found = [part for i, entry in enumerate(entries) for part in _sources(entry, f"{name}[{i}]", format_of, notes)]
        if found or name == "datasets":
            values[foreign.AXOLOTL[name].key] = tuple(found)
    share = float(given.get("val_set_size") or 0)
    if 0 < share <= 0.5:
        values["data.holdout"] = share
    elif share:
        notes.append(f"val_set_size: left out: {share:g} is no share up to 0.5; set config.data.holdout, or data.eval")
    values["data.train_on"] = "all" if given.get("train_on_inputs") and not given.get("rl") else "assistant"
    return values


_OF_A_DATASET = {"path", "name", "data_files", "ds_type", "split", "type", "field_messages", "field"}
_OF_A_DATASET |= {"field_chosen", "field_rejected"}
# Values that say what ftjax does anyway.
_USUAL = {
    "roles_to_train": (["assistant"], ["gpt"]),
    "train_on_eos": ("turn",),
    "message_property_mappings": ({"role": "role", "content": "content"}, {"role": "from", "content": "value"}),
}


def _sources(entry: dict, where: str, format_of: Callable, notes: list[str]) -> list[dict[str, Any]]:
    """Entries of data.train for one of their data sets."""
    if not isinstance(entry, dict) or not entry.get("path"):
        raise UserError(f"{where}: has no path")
    path, files = entry["path"], entry.get("data_files") or []
    files = [files] if isinstance(files, str) else files
    local = "://" in path or Path(path).exists() or _is_file(path) or path in ("json", "csv", "parquet")
    if files:
        sources = files if local else [f"hf://datasets/{path}/{file}" for file in files]
    elif local and (_is_file(path) or "://" in path):
        sources = [path]
    else:
        sources = [f"hf:{path}:{entry['name']}" if entry.get("name") else f"hf:{path}"]
    options = format_of(entry, where, notes)
    if split := entry.get("split"):
        of_files = files or not sources[0].startswith("hf:")
        if not of_files:
            options["split"] = split
        elif "[" in split:
            options["split"] = "train" + split[split.index("[") :]
    for name, value in entry.items():
        if name not in _OF_A_DATASET and value not in (None, False, "", [], {}, *_USUAL.get(name, ())):
            notes.append(f"{where}.{name}: left out: rows are read by the names of their fields (docs/data.md)")
    return [{"source": source, **options} for source in sources]


def _is_file(path: str) -> bool:
    suffixes = Path(path).suffixes
    return bool(suffixes) and (suffixes[-1] in FILE_KINDS or suffixes[-1] in COMPRESSIONS)


# Their preference rows by the last part of `type`: our names of the fields -> theirs, where they differ.
_PREFERENCES = {
    "argilla_chat": {},
    "prompt_pairs": {},
    "ultra": {},
    "intel": {"prompt": "question"},
    "icr": {"prompt": "input"},
    "argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
}
# Their rows of answers called good or bad, likewise.
_LABELED = {"prompt_pairs": {}, "ultra": {}, "intel": {"prompt": "question"}, "argilla": {"prompt": "instruction"}}
# The fields that a `type` of one's own names -> ours: of a preference, of an instruction.
_OWN = (
    ("preference", {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}),
    ("alpaca", {"field_instruction": "instruction", "field_output": "output"}),
)


def _format(entry: dict, where: str, notes: list[str]) -> dict[str, Any]:
    """The options `format` and `columns` for their `type`; none where the fields of the rows are to say it."""
    kind, field = entry.get("type"), entry.get("field_messages") or "messages"
    name, _, style = kind.partition(":" if ":" in kind else ".") if isinstance(kind, str) else ("", "", "")
    if name == "alpaca":
        notes.append(
            f"{where}: instruction and answer become turns of the model's chat template, not '### Instruction:'"
        )
        return {"format": "alpaca"}
    if kind == "sharegpt" or (kind == "chat_template" and field == "conversations"):
        return {"format": "sharegpt"}
    if kind == "chat_template":
        return {"format": "messages"} | ({"columns": {"messages": field}} if field != "messages" else {})
    if name in ("completion", "pretrain"):
        text = entry.get("field") or "text"
        return {"format": "text"} | ({"columns": {"text": text}} if text != "text" else {})
    if kind == "chat_template.default":  # the prompt in messages, and an answer on each side
        sides = {side: entry.get(f"field_{side}") or side for side in ("chosen", "rejected")}
        return {"format": "preference", "columns": {"prompt": field, **sides}}
    if style in _PREFERENCES:
        columns = _PREFERENCES[style]
        return {"format": "preference"} | ({"columns": columns} if columns else {})
    for format, names in _OWN:
        if isinstance(kind, dict) and kind.keys() & names.keys():
            columns = {ours: kind[theirs] for theirs, ours in names.items() if kind.get(theirs) not in (None, ours)}
            if patterns := [key for key in kind if key.endswith("format") and kind[key]]:
                notes.append(f"{where}.type.{patterns[0]}: left out: the model's chat template is used")
            return {"format": format} | ({"columns": columns} if columns else {})
    notes.append(
        f"{where}.type: {kind!r}: the format is recognized by the fields of a row; docs/data.md has their names"
    )
    return {}


def _labeled_format(entry: dict, where: str, notes: list[str]) -> dict[str, Any]:
    """The same with `rl: kto`, where a `type` of one name stands for other rows."""
    kind = entry.get("type")
    if isinstance(kind, dict):
        fields = {name: kind.get(f"field_{name}") for name in ("prompt", "completion", "label")}
        columns = {ours: theirs for ours, theirs in fields.items() if theirs not in (None, ours)}
    elif str(kind).rpartition(".")[2] in _LABELED:
        columns = _LABELED[kind.rpartition(".")[2]]
    else:
        notes.append(f"{where}.type: {kind!r}: rows are read as prompt, completion and label; docs/data.md has more")
        return {}
    return {"format": "kto"} | ({"columns": columns} if columns else {})


def _optimizer(given: dict, notes: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    name = str(given.get("optimizer") or "adamw_torch_fused").lower()
    if re.match(r"(paged_|ao_|optimi_|flash_)?adamw", name):
        values["optimizer.name"] = "adamw"
        if re.search(r"[48]bit|fp8", name):
            notes.append(f"optimizer: {name} becomes adamw, whose state is not quantized")
    elif configs.KEYS["optimizer.name"].check.holds(name):
        values["optimizer.name"] = name
    else:
        notes.append(f"optimizer: {name!r} is left out, and adamw taken: ftjax has no optimizer of that name")
    schedule = given.get("lr_scheduler") or "cosine"
    if configs.KEYS["schedule.name"].check.holds(schedule):
        values["schedule.name"] = schedule
        if schedule == "constant":
            values["schedule.warmup_ratio"] = 0.0
    elif schedule == "constant_with_warmup":
        values["schedule.name"] = "constant"
    else:
        notes.append(f"lr_scheduler: {schedule!r} is left out, and cosine taken: ftjax has no schedule of that name")
    if (warmup := given.get("warmup_steps")) is not None:  # below 1 it is a share, as in transformers
        key = "schedule.warmup_ratio" if 0 < float(warmup) < 1 else "schedule.warmup_steps"
        values[key] = _as(key, "warmup_steps", warmup)
    if per_epoch := given.get("evals_per_epoch"):
        values["eval_epochs"] = 1 / float(per_epoch)
    for name in ("save_steps", "eval_steps"):
        steps, key = given.get(name), foreign.AXOLOTL[name].key
        if steps and float(steps) < 1:
            notes.append(f"{name}: left out: {steps} is a share of all steps, and config.{key} counts steps")
        elif steps:
            values[key] = _as(key, name, steps)
    if patience := given.get("early_stopping_patience"):
        if values.keys() & {"eval_every", "eval_epochs"}:
            values["evaluate.patience"] = _as("evaluate.patience", "early_stopping_patience", patience)
        else:
            notes.append("early_stopping_patience: left out: neither eval_steps nor evals_per_epoch says how often")
    return values


def _objective(given: dict, notes: list[str]) -> dict[str, Any]:
    rl = given.get("rl")
    if not rl:
        return {}
    if rl not in METHODS:
        raise UserError(f"rl: {rl!r} is no method of ftjax, which are {', '.join(METHODS)}")
    if "rewards" in METHODS[rl].settings:
        raise UserError(
            f"rl: {rl}: its rewards are Python files that this does not read; write a config with objective.name={rl} "
            "(docs/reinforcement.md)"
        )
    return {"objective.name": rl}


def _batch(given: dict, notes: list[str], devices: int) -> dict[str, Any]:
    micro, accumulate = (
        _as("data.batch_size", name, given.get(name) or 1)
        for name in ("micro_batch_size", "gradient_accumulation_steps")
    )
    if given.get("batch_size"):
        accumulate = max(1, _as("data.batch_size", "batch_size", given["batch_size"]) // micro // devices)
    rows = micro * accumulate * devices
    notes.append(
        f"data.batch_size: {rows} rows: {micro} x {accumulate} on each of {devices} device(s); --devices says how many"
    )
    return {"data.batch_size": rows, "accumulate": accumulate}


def as_yaml(values: dict[str, Any], source: str) -> str:
    """YAML for --config of {dotted key: value}."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, leaf = key.rpartition(".")
        value = (
            [list(item) if isinstance(item, tuple) else item for item in value] if isinstance(value, tuple) else value
        )
        (nested.setdefault(section, {}) if section else nested)[leaf] = value
    return f"# {source}, by python -m ftjax.import_config\n" + yaml.safe_dump(
        nested, sort_keys=False, allow_unicode=True
    )


def read(path: Path) -> dict[str, Any]:
    """An Axolotl config; UserError where it cannot be read."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{path}:{mark.line + 1 if mark else 1}: not YAML ({error.problem})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({error})") from error
    if not isinstance(given, dict):
        raise UserError(f"{path}: holds no keys and values")
    return given


def main(argv: Sequence[str]) -> int:
    about, _, examples = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "ftjax.import_config",
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="a config of Axolotl's, in YAML")
    parser.add_argument("--out", type=Path, help="the .yaml to write (default: it is printed)")
    parser.add_argument("--devices", type=int, default=1, help="how many GPUs it is run on (default 1)")
    args = parser.parse_args(argv)
    if args.devices < 1:
        raise UserError(f"--devices {args.devices}: must be 1 or more")
    if args.out and args.out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {args.out}: name a file that ends in .yaml")
    if args.out and args.out.exists():
        raise UserError(f"--out {args.out}: exists; name another file or remove it")
    given = read(args.file)
    try:
        values, notes = imported(given, args.devices)
        config = configs.defaults()
        for key, value in values.items():
            configs.assign(config, key, value)
        configs.validate(config)
    except UserError as error:
        raise UserError(f"{args.file}: {error}") from error
    text = as_yaml(values, f"From {args.file.name}")
    for note in notes:
        print(note, file=sys.stderr)
    if args.out is None:
        print(text, end="")
        return 0
    write_text(args.out, text)
    workdir = f" --workdir {shlex.quote(given['output_dir'])}" if given.get("output_dir") else ""
    print(f"python -m ftjax.train --config {shlex.quote(str(args.out))}{workdir}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.exit_with(lambda: main(sys.argv[1:]))
