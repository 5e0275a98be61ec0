"""LoRA adapters as PEFT directories: `adapter_config.json` and `adapter_model.safetensors`.

`peft` itself loads with strict=False and is silent about keys that do not fit; here each one is an error.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ftjax import tree
from ftjax.errors import UserError
from ftjax.lora import linear_kernels
from ftjax.models.spec import DecoderSpec
from ftjax.weights.files import inside, read_json
from ftjax.weights.keys import FLOATS, Key, finite_cast, hf_names
from ftjax.weights.safetensors import SafetensorsFile
from ftjax.weights.safetensors_write import Tensor, write_safetensors
from ftjax.weights.together import gather, new_directory_together, together
from ftjax.weights.write import write_json

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
    multimodal: bool = False,
    card: str | None = None,
) -> None:
    """Writes the `lora` collection (nested dict of lora_a [L, in, r], lora_b [L, r, out]) as a PEFT adapter.

    Every process calls it alike and the first one writes (see `together`). `base_name` goes to base_model_name_or_path;
    `multimodal`: transformers has the base's language model inside another model (Gemma 3); `card`: README.md. The
    directory is written beside `out`, read back, and renamed. Raises UserError when `out` exists and is not empty, and
    for NaN or infinite values; ValueError when the adapters do not belong to `spec` and `rank`.
    """
    leaves = tree.flatten(adapters)
    modules = sorted({path.rpartition("/")[0] for path in leaves})
    keys = _adaptable(spec)
    if not modules or not keys.keys() >= set(modules):
        raise ValueError(f"no adapters, or adapters of what is not a kernel: {modules}")
    expected, tensors = set(), []
    for module in modules:
        for half, key in _halves(keys[module], rank, multimodal).items():
            path = f"{module}/{half}"
            expected.add(path)
            if path not in leaves or leaves[path].shape != key.our_shape:
                raise ValueError(f"{path} is absent or not of rank {rank} of {spec}")
            for place in key.places():
                values = functools.partial(_transposed_part, leaves[path], place)
                tensors.append(Tensor(key.name(place), key.shape, np.dtype(leaves[path].dtype), values))
    if leaves.keys() != expected:
        raise ValueError(f"not parts of an adapter: {sorted(leaves.keys() - expected)}")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": rslora,
        "use_dora": False,
        "target_modules": _target_modules(modules, spec, multimodal),
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "init_lora_weights": True,
        # peft's name for a base layer stored as [in, out]; the adapter's own matrices are as ever.
        "fan_in_fan_out": not all(keys[module].transposed for module in modules),
    }
    with new_directory_together(out) as directory:
        write_safetensors(directory / "adapter_model.safetensors", tensors)
        with together(f"writing {directory}"):
            if jax.process_index() == 0:
                write_json(directory / "adapter_config.json", config)
                if card is not None:
                    (directory / "README.md").write_text(card, encoding="utf-8")


def read_adapter(path: Path, spec: DecoderSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """(adapters, settings) of a PEFT directory, for a base of `spec`.

    adapters: nested dict of float32 lora_a [L, in, r] and lora_b [L, r, out], as in the `lora` collection.
    settings: `rank`, `alpha`, `rslora` and `base_name` (None if not given). Raises UserError for settings
    that are not supported, by name, and with a complete list for tensors that are missing, of another shape
    or not used.
    """
    path = Path(path)
    config = read_json(inside(path, "adapter_config.json"))
    adaptable = _adaptable(spec)
    settings = _settings(path, config, conv1d=not all(key.transposed for key in adaptable.values()))
    file = inside(path, "adapter_model.safetensors")
    if not file.is_file():
        also = (
            "; adapter_model.bin is a pickle and never opened"
            if (path / "adapter_model.bin").exists()
            else ""
        )
        raise UserError(f"{file}: no such file{also}; save the adapter as safetensors (peft's default)")
    stored = SafetensorsFile(file)
    multimodal = spec.family == "gemma3_text" and any(".language_model." in name for name in stored.names())
    keys = {}
    for module, key in adaptable.items():
        found = _halves(key, settings["rank"], multimodal)
        halves = {f"{module}/{half}": half_key for half, half_key in found.items()}
        names = {name for half in halves.values() for name in half.names()}
        if names & stored.names() or _is_target(_module_name(key, multimodal), config):
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


def _module_name(key: Key, multimodal: bool) -> str:
    """transformers' name of the linear layer `key`, with {} for the layer."""
    name = key.template.removesuffix(".weight")
    # Gemma 3 with its vision tower, the only such model here, has the language model's body one level deeper.
    return name.replace("model.", "model.language_model.", 1) if multimodal and name.startswith("model.") else name


def _halves(key: Key, rank: int, multimodal: bool) -> dict[str, Key]:
    """The Keys of lora_a, [r, in] in the file, and lora_b, [out, r], of the linear layer `key`.

    This is the way round for peft whether the layer itself is stored as [out, in] or, as GPT-2's are, as [in, out].
    """
    module = _PREFIX + _module_name(key, multimodal)
    rows, columns = key.shape if key.transposed else key.shape[::-1]
    return {
        "lora_a": Key(f"{module}.lora_A.weight", (rank, columns), key.stack, transposed=True),
        "lora_b": Key(f"{module}.lora_B.weight", (rows, rank), key.stack, transposed=True),
    }


def _target_modules(modules: Sequence[str], spec: DecoderSpec, multimodal: bool) -> list[str]:
    """For adapter_config.json: names that peft finds in the trained layers of the model and in no others.

    peft takes a name for every module that ends with it. So a name is as short as it can be: "q_proj", but
    "attn.c_proj" where GPT-2's other c_proj is not adapted. A multimodal model has a vision tower with such names too,
    and gets whole names, one for each layer.
    """
    keys = hf_names(spec)
    ours = {_module_name(keys[f"{module}/kernel"], multimodal) for module in modules}
    if multimodal:
        stacks = {_module_name(keys[f"{module}/kernel"], True): keys[f"{module}/kernel"] for module in modules}
        return sorted(name.format(*place) for name, key in stacks.items() for place in key.places())
    others = {_module_name(key, multimodal) for path, key in keys.items() if path.endswith("/kernel")} - ours
    found = set()
    for name in ours:
        parts = name.split(".")
        suffixes = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        found.add(next(one for one in suffixes if not any(f".{other}".endswith(f".{one}") for other in others)))
    return sorted(found)


def _transposed_part(leaf: Any, place: tuple[int, ...]) -> np.ndarray:
    return gather(leaf, place).T


def _settings(path: Path, config: dict[str, Any], conv1d: bool) -> dict[str, Any]:
    """conv1d: the model stores linear layers as [in, out], which peft notes in the adapter and which is right here."""
    config = {key: value for key, value in config.items() if not (conv1d and key == "fan_in_fan_out")}
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


def _is_target(name: str, config: dict[str, Any]) -> bool:
    """Whether a list of target_modules names the layers `name`, which has {} for their number.

    A regular expression (a string) is left to the keys.
    """
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("exclude_modules"):
        return False
    first = name.format(0)  # where one layer is adapted, all must be
    return any(isinstance(target, str) and f".{first}".endswith(f".{target}") for target in targets)


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
