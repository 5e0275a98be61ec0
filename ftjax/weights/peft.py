"""LoRA adapters as PEFT directories: `adapter_config.json` and `adapter_model.safetensors`.

`peft` itself loads with strict=False and is silent about keys that do not fit; here each one is an error.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ftjax import tree
from ftjax.errors import UserError
from ftjax.lora import linear_kernels
from ftjax.models.spec import DecoderSpec
from ftjax.weights.files import inside, new_directory, read_json
from ftjax.weights.keys import FLOATS, Key, finite_cast, hf_names
from ftjax.weights.safetensors import SafetensorsFile
from ftjax.weights.write import same_bits, write_json

_PREFIX = "base_model.model."

# Settings that change nothing about the result of a trained adapter, and what the others must be. A setting
# that is in neither is refused when it is set: a newer peft may mean something by it.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",  # with init_lora_weights, which is checked
    "ensure_weight_tying",  # only concerns modules_to_save
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",  # a module name, unused without megatron_config
    "peft_version",
    "qalora_group_size",  # unused without use_qalora
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
_REQUIRED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Others (pissa, olora, corda, loftq, ...) change the base weights that the adapter is added to.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


def write_adapter(
    out: Path,
    adapters: dict[str, Any],
    spec: DecoderSpec,
    rank: int,
    alpha: float,
    rslora: bool,
    base_name: str,
) -> None:
    """Writes the `lora` collection (nested dict of lora_a [L, in, r], lora_b [L, r, out]) as a PEFT adapter.

    `base_name` goes to base_model_name_or_path. The directory is written beside `out`, read back, and
    renamed. Raises UserError when `out` exists and is not empty, and for NaN or infinite values; ValueError
    when the adapters do not belong to `spec` and `rank`.
    """
    leaves = tree.flatten(adapters)
    modules = sorted({path.rpartition("/")[0] for path in leaves})
    keys = _adaptable(spec)
    if not modules or not keys.keys() >= set(modules):
        raise ValueError(f"no adapters, or adapters of what is not a kernel: {modules}")
    expected = {}
    tensors = {}
    for module in modules:
        for half, half_key in _halves(keys[module], rank).items():
            path = f"{module}/{half}"
            expected[path] = half_key
            if path not in leaves or leaves[path].shape != half_key.our_shape:
                raise ValueError(f"{path} is absent or not of rank {rank} of {spec}")
            values = np.asarray(leaves[path])
            for place in half_key.places():
                tensor = half_key.name(place)
                tensors[tensor] = np.ascontiguousarray(finite_cast(values[place], values.dtype, tensor).T)
    if leaves.keys() != expected.keys():
        raise ValueError(f"not parts of an adapter: {sorted(leaves.keys() - expected.keys())}")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": rslora,
        "use_dora": False,
        "target_modules": sorted({module.rpartition("/")[2] for module in modules}),
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
    }
    with new_directory(out) as directory:
        write_json(directory / "adapter_config.json", config)
        file = directory / "adapter_model.safetensors"
        save_file(tensors, file, metadata={"format": "pt"})
        stored = SafetensorsFile(file)
        if stored.names() != tensors.keys() or not all(
            same_bits(stored.read(n), tensors[n]) for n in tensors
        ):
            raise OSError(f"{file}: does not read back as it was written; check the disk")


def read_adapter(path: Path, spec: DecoderSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """(adapters, settings) of a PEFT directory, for a base of `spec`.

    adapters: nested dict of float32 lora_a [L, in, r] and lora_b [L, r, out], as in the `lora` collection.
    settings: `rank`, `alpha`, `rslora` and `base_name` (None if not given). Raises UserError for settings
    that are not supported, by name, and with a complete list for tensors that are missing, of another shape
    or not used.
    """
    path = Path(path)
    config = read_json(inside(path, "adapter_config.json"))
    settings = _settings(path, config)
    file = inside(path, "adapter_model.safetensors")
    if not file.is_file():
        also = (
            "; adapter_model.bin is a pickle and never opened"
            if (path / "adapter_model.bin").exists()
            else ""
        )
        raise UserError(f"{file}: no such file{also}; save the adapter as safetensors (peft's default)")
    stored = SafetensorsFile(file)
    keys = {}
    for module, key in _adaptable(spec).items():
        halves = {f"{module}/{half}": half_key for half, half_key in _halves(key, settings["rank"]).items()}
        names = {name for half in halves.values() for name in half.names()}
        if names & stored.names() or _is_target(module, config):
            keys |= halves
    _check(file, stored, keys)
    leaves = {}
    for leaf, key in keys.items():
        parts = [finite_cast(stored.read(name), np.dtype(np.float32), f"{file}: {name}").T for name in key.names()]
        leaves[leaf] = np.stack(parts).reshape(key.our_shape)
    return tree.unflatten(leaves), settings


def _adaptable(spec: DecoderSpec) -> dict[str, Key]:
    """{"layers/mlp/up_proj": the Key of its kernel}: the linear layers, as lora.linear_kernels has them."""
    keys = hf_names(spec)
    return {path.removesuffix("/kernel"): keys[path] for path in linear_kernels(keys)}


def _halves(key: Key, rank: int) -> dict[str, Key]:
    """The Keys of lora_a, [r, in] in the file, and lora_b, [out, r], of the linear layer `key`."""
    module = _PREFIX + key.template.removesuffix(".weight")
    rows, columns = key.shape if key.transposed else key.shape[::-1]
    return {
        "lora_a": Key(f"{module}.lora_A.weight", (rank, columns), key.stack, transposed=True),
        "lora_b": Key(f"{module}.lora_B.weight", (rows, rank), key.stack, transposed=True),
    }


def _settings(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    problems = [f"{name}={config.get(name)!r}" for name in _REQUIRED if not _allowed(name, config)]
    known = _HARMLESS | _REQUIRED.keys()
    problems += [f"{name}={value!r}" for name, value in sorted(config.items()) if name not in known and value]
    if problems:
        raise UserError(
            f"{path}/adapter_config.json: settings that are not supported: {', '.join(problems)}; "
            "save a plain LoRA adapter, or merge it into its base with peft and use that as the model"
        )
    rank, alpha, rslora = config.get("r"), config.get("lora_alpha"), config.get("use_rslora") or False
    if type(rank) is not int or rank < 1:
        raise UserError(f"{path}/adapter_config.json: r is {rank!r}, not a positive whole number")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(f"{path}/adapter_config.json: lora_alpha is {alpha!r}, not a number")
    if not isinstance(rslora, bool):
        raise UserError(f"{path}/adapter_config.json: use_rslora is {rslora!r}, not true or false")
    base_name = config.get("base_model_name_or_path")
    return {"rank": rank, "alpha": alpha, "rslora": rslora, "base_name": base_name}


def _allowed(name: str, config: dict[str, Any]) -> bool:
    # peft's own defaults stand for what older files leave out; the type of an adapter has none. 1 is not True
    # here.
    value = config.get(name, None if name == "peft_type" else _REQUIRED[name][0])
    return any(value == choice and type(value) is type(choice) for choice in _REQUIRED[name])


def _is_target(module: str, config: dict[str, Any]) -> bool:
    """Whether a list of target_modules names it. A regular expression (a string) is left to the keys."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("exclude_modules"):
        return False
    dotted = f"model.{module.replace('/', '.')}" if module.startswith("layers/") else module
    return any(isinstance(target, str) and f".{dotted}".endswith(f".{target}") for target in targets)


def _check(file: Path, stored: SafetensorsFile, keys: dict[str, Key]) -> None:
    expected = {name: key.shape for key in keys.values() for name in key.names()}
    problems = [
        f"missing: {name} {list(expected[name])}" for name in sorted(expected.keys() - stored.names())
    ]
    problems += [f"not used: {name}" for name in sorted(stored.names() - expected.keys())]
    for name in sorted(expected.keys() & stored.names()):
        if stored.shape(name) != expected[name]:
            problems.append(f"shape: {name} is {list(stored.shape(name))}, needed is {list(expected[name])}")
        elif stored.dtype(name).name not in FLOATS:
            problems.append(
                f"type: {name} is {stored.dtype(name).name}, not floating point of 16 bits or more"
            )
    if not expected:
        problems.append("it adapts no linear layer of the model")
    if problems:
        raise UserError(
            "\n  ".join([f"{file}: this adapter does not fit the model:", *problems])
            + "\nUse the base that it was trained on, and an adapter of the linear layers in every layer."
        )
