"""`adapter_config.json` of a PEFT adapter: writing it, and reading the settings that are supported."""

import collections
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ftjax import lora
from ftjax.errors import UserError
from ftjax.models.spec import DecoderSpec
from ftjax.weights.hf import classifier
from ftjax.weights.hf.keys import Key
from ftjax.weights.peft import keys as peft_keys
from ftjax.weights.peft.keys import EMBEDDING, HEAD, Places

# Settings that do not change what a trained adapter computes. A setting in none of these three tables is refused when
# it has a value: it may come from a newer peft and change the result.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",  # with init_lora_weights, which is checked
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",  # a module name, unused without megatron_config
    "peft_version",
    "qalora_group_size",  # unused without use_qalora
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
_READ = {  # by `read_settings`
    "alpha_pattern",
    "ensure_weight_tying",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "r",
    "rank_pattern",
    "target_parameters",
    "use_dora",
    "use_rslora",
}
_REQUIRED = {  # {name: the values that are supported}
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Others (pissa, olora, corda, loftq, ...) change the base weights that the adapter is added to.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


_TASKS = {None: "CAUSAL_LM", classifier.TEXTS: "SEQ_CLS", classifier.TOKENS: "TOKEN_CLS"}  # {kind of head: peft's name}


class LoraSettings(NamedTuple):
    """What adapter_config.json says about an adapter's computation."""

    rank: int
    alpha: float
    rslora: bool
    dora: bool
    dropout: float
    rank_pattern: dict[str, int]  # peft's regular expressions over transformers' module names
    alpha_pattern: dict[str, float]
    modules_to_save: list[str]  # ends of transformers' module names
    ensure_weight_tying: bool
    base_name: str | None


def adapter_config(
    layers: Mapping[str, dict[tuple[int, ...], tuple[int, float]]],
    saved: set[str],
    spec: DecoderSpec,
    rslora: bool,
    dora: bool,
    dropout: float,
    base_name: str,
    multimodal: bool,
    kind: str | None = None,
) -> dict[str, Any]:
    """The content of adapter_config.json.

    layers: {module: {place of an adapted layer (`Key.places`): its (rank, scale)}}; saved: the modules that were
    trained whole. kind: of the model's head, where that is one of numbers (`weights.hf.classifier`).

    The commonest rank and alpha are `r` and `lora_alpha`; the others go to the patterns.
    """
    keys = peft_keys.adaptable(spec)
    places = {module: list(of_layers) for module, of_layers in layers.items()}
    ranks = {module: [rank for rank, _ in its.values()] for module, its in layers.items()}
    alphas = {module: [_alpha(*of_layer, rslora) for of_layer in its.values()] for module, its in layers.items()}
    rank, rank_pattern = _patterns(ranks, places, keys, spec, multimodal)
    alpha, alpha_pattern = _patterns(alphas, places, keys, spec, multimodal)
    numbers = peft_keys.layers_to_transform(places, spec, multimodal)
    names = peft_keys.modules_to_save(saved, spec, multimodal) if saved else []
    names += [] if kind is None else [classifier.module(spec.family, kind)]
    tied = spec.tie_word_embeddings and EMBEDDING in saved
    parameters = peft_keys.target_parameters(places, spec, multimodal)
    if parameters and dora:
        raise UserError(
            f"{parameters[0]}: peft has no DoRA of dense layers beside a mixture; use --format merged or hf"
        )
    return {
        "peft_type": "LORA",
        "task_type": _TASKS[kind],
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else dropout,  # which peft has not for parameters; a new run has its own
        "bias": "none",
        "use_rslora": rslora,
        "use_dora": dora,
        "target_modules": peft_keys.target_modules(places, spec, multimodal),
        # peft gives each of the two its own copy of a tied matrix, so both must be named.
        "modules_to_save": sorted([*names, HEAD] if tied else names) or None,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "init_lora_weights": True,
        # peft's name for a base layer stored as [in, out]; it changes nothing about the adapter's own matrices.
        "fan_in_fan_out": peft_keys.is_conv1d({module: keys[module] for module in layers}),
        **({"layers_to_transform": numbers} if numbers is not None else {}),
        **({"target_parameters": parameters} if parameters else {}),
        **({"ensure_weight_tying": True} if tied else {}),  # only where needed: older versions of peft lack it
    }


def _alpha(rank: int, scale: float, rslora: bool) -> float:
    """The shortest number that gives `scale`, a float32, exactly."""
    value = float(scale) * (math.sqrt(rank) if rslora else rank)
    candidates = (float(f"{value:.{digits}g}") for digits in range(1, 18))
    exact = (alpha for alpha in candidates if np.float32(lora.scale(rank, alpha, rslora)) == np.float32(scale))
    alpha = next(exact, value)
    return int(alpha) if alpha == int(alpha) else alpha


def _patterns(
    values: Mapping[str, list[float]], places: Places, keys: Mapping[str, Key], spec: DecoderSpec, multimodal: bool
) -> tuple[float, dict[str, float]]:
    """(the commonest value, or the largest of equally common ones; {peft's pattern: value} of the others)"""
    counts = collections.Counter(value for of_layers in values.values() for value in of_layers)
    common = max(counts, key=lambda value: (counts[value], value))
    patterns, alike = {}, collections.defaultdict(list)
    for module in values:  # peft knows no stacks of layers: what has one name in several of them is one there
        alike[keys[module].template].append(module)
    for modules in alike.values():
        own = {value for module in modules for value in values[module]}
        if len(own) == 1:
            patterns |= dict.fromkeys(peft_keys.patterns(modules, spec, multimodal), own.pop())
            continue
        for module in modules:
            names = peft_keys.patterns_of_layers(module, places[module], spec, multimodal)
            patterns |= dict(zip(names, values[module], strict=True))
    return common, {name: value for name, value in patterns.items() if value != common}


def read_settings(path: Path, config: dict[str, Any], spec: DecoderSpec, conv1d: bool) -> LoraSettings:
    """The settings in `config`, the content of path/adapter_config.json.

    conv1d: whether the model stores linear layers as [in, out]; then the adapter may say so, as fan_in_fan_out.
    Raises UserError, with the setting's name, for values that are not supported or of the wrong type.
    """
    file = f"{path}/adapter_config.json"
    config = {key: value for key, value in config.items() if not (conv1d and key == "fan_in_fan_out")}
    problems = [f"{name}={config.get(name)!r}" for name in _REQUIRED if not _allowed(name, config)]
    known = _HARMLESS | _READ | _REQUIRED.keys()
    problems += [f"{name}={value!r}" for name, value in sorted(config.items()) if name not in known and value]
    if not _all_known(config.get("target_parameters"), spec):
        problems.append(f"target_parameters={config['target_parameters']!r}")
    if problems:
        raise UserError(
            f"{file}: settings that are not supported: {', '.join(problems)}; save a plain LoRA adapter "
            "(PiSSA and the like: with path_initial_model_for_weight_conversion), or merge it into its base with peft "
            "and use that as the model"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not _is_positive_int(rank):
        raise UserError(f"{file}: r is {rank!r}, not a positive whole number")
    if not _is_number(alpha) or alpha == 0:
        raise UserError(f"{file}: lora_alpha is {alpha!r}, not a number other than 0")
    dropout = config.get("lora_dropout") or 0.0
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise UserError(f"{file}: lora_dropout is {dropout!r}, not a rate")
    flags = {}
    for name in ("use_rslora", "use_dora", "ensure_weight_tying"):
        flags[name] = config.get(name) or False
        if not isinstance(flags[name], bool):
            raise UserError(f"{file}: {name} is {flags[name]!r}, not true or false")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise UserError(f"{file}: modules_to_save is {saved!r}, not a list of names")
    layers = config.get("layers_to_transform")
    for layer in [] if layers is None else _as_list(layers):
        if type(layer) is not int or not 0 <= layer < spec.num_hidden_layers:
            last = spec.num_hidden_layers - 1
            raise UserError(f"{file}: layers_to_transform has {layer!r}, and the model the layers 0 to {last}")
    for pattern in _as_list(config.get("layers_pattern") or []):
        _check_pattern(file, "layers_pattern", pattern)
    return LoraSettings(
        rank=rank,
        alpha=alpha,
        rslora=flags["use_rslora"],
        dora=flags["use_dora"],
        dropout=dropout,
        rank_pattern=_pattern_dict(file, config, "rank_pattern", _is_positive_int),
        alpha_pattern=_pattern_dict(file, config, "alpha_pattern", _is_number),
        modules_to_save=saved,
        ensure_weight_tying=flags["ensure_weight_tying"],
        base_name=config.get("base_model_name_or_path"),
    )


def kind_of(config: dict[str, Any]) -> str | None:
    """The kind of the model's head (`weights.hf.classifier`), where it gives numbers; None where it gives tokens."""
    return next((kind for kind, task in _TASKS.items() if kind and task == config.get("task_type")), None)


def by_pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The value of the first pattern that matches the end of a module's `name`, as in peft's get_pattern_key."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def unmatched(patterns: Mapping[str, float], names: Iterable[str]) -> list[str]:
    """The patterns that match none of the `names`."""
    names = list(names)
    return [key for key in patterns if not any(re.match(rf"(.*\.)?({key})$", name) for name in names)]


def is_target(name: str, config: dict[str, Any], parameter: bool = False) -> bool:
    """Whether a list of target_modules, or of target_parameters, names this module or `parameter` of a layer.

    A regular expression (a string) is left to the keys. As in peft, layers_to_transform counts where a module's name is
    not given whole.
    """
    targets = config.get("target_parameters" if parameter else "target_modules")
    if not isinstance(targets, list) or (config.get("exclude_modules") and not parameter):  # which are of modules alone
        return False
    chosen = name in targets or parameter or in_chosen_layers(name, config)
    return chosen and any(isinstance(target, str) and f".{name}".endswith(f".{target}") for target in targets)


def in_chosen_layers(name: str, config: dict[str, Any]) -> bool:
    """Whether a module of this name is in layers_to_transform, as all are where that is not set."""
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if layers is None or layers == []:
        return True
    starts = [rf"(?:^|.*?\.){pattern}" for pattern in _as_list(patterns)] or [r".*?\.[^.]*"]
    found = next(filter(None, (re.match(rf"{start}\.(?P<number>\d+)\.", name) for start in starts)), None)
    return found is not None and int(found["number"]) in _as_list(layers)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _all_known(targets: Any, spec: DecoderSpec) -> bool:
    """Whether target_parameters names nothing but what is written there, too."""
    adaptable = peft_keys.adaptable(spec)
    modules = peft_keys.as_parameters(adaptable, spec)
    names = [
        f".{name}"
        for module in modules
        for multimodal in (False, True)
        for name in peft_keys.parameter_names(module, adaptable[module], multimodal)
    ]
    return not targets or (
        isinstance(targets, list)
        and all(isinstance(target, str) and any(name.endswith(f".{target}") for name in names) for target in targets)
    )


def _allowed(name: str, config: dict[str, Any]) -> bool:
    # Settings that older files leave out have peft's defaults; peft_type has none. The type counts: 1 is not True here.
    value = config.get(name, None if name == "peft_type" else _REQUIRED[name][0])
    return any(value == choice and type(value) is type(choice) for choice in _REQUIRED[name])


def _is_positive_int(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _pattern_dict(file: str, config: dict[str, Any], name: str, is_valid: Callable[[Any], bool]) -> dict[str, Any]:
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict) or not all(is_valid(value) for value in patterns.values()):
        raise UserError(f"{file}: {name} is {patterns!r}, not an object of patterns and numbers")
    for pattern in patterns:
        _check_pattern(file, name, pattern)
    return patterns


def _check_pattern(file: str, name: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise UserError(f"{file}: {name} has {pattern!r}, which is not a regular expression: {error}") from error
