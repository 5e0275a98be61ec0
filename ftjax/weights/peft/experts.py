"""What peft calls the parameters of a mixture's experts, which `target_parameters` names, and how it wraps them."""

import functools
from typing import NamedTuple

from ftjax.models.spec import DecoderSpec
from ftjax.weights.hf.keys import Key, hf_names

# What transformers calls a layer's experts; "mlp.experts" in all other families.
_NAMES = {
    "gemma4_text": "experts",
    "granitemoe": "block_sparse_moe.experts",
    "granitemoehybrid": "block_sparse_moe.experts",
    "llama4_text": "feed_forward.experts",
    "nemotron_h": "mixer.experts",
}
# Where transformers has [experts, in, out] without telling peft, which takes it for [experts, out, in]: its A is our B.
_TURNED = ("llama4_text",)


class Parameter(NamedTuple):
    """One of the two parameters of the experts of each layer in a stack."""

    key: Key  # of [experts, out, in] in each layer
    columns: dict[str, tuple[int, int]]  # {our module: the first of its columns in the output, the end of them}
    turned: bool

    @property
    def count(self) -> int:
        return self.key.shape[0]

    def parts(self, name: str, rank: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """As `keys.parts`, of the wrapped module of this name."""
        _, rows, columns = self.key.shape if not self.turned else (self.count, *self.key.shape[:0:-1])
        a, b = (
            (f"{name}.lora_A.weight", (rank * self.count, columns)),
            (f"{name}.lora_B.weight", (rows, rank * self.count)),
        )
        return {"lora_a": a, "lora_b": b}


def is_expert(module: str) -> bool:
    return "/experts/" in module


@functools.lru_cache(maxsize=16)
def parameters(spec: DecoderSpec) -> dict[str, Parameter]:
    """{"layers/mlp/experts/gate_up_proj": ...}, with the level of the stack in the path as everywhere."""
    keys, out = hf_names(spec), {}
    kernels = {path.removesuffix("/kernel") for path in keys if is_expert(path) and path.endswith("/kernel")}
    for place in sorted({module.rpartition("/")[0] for module in kernels}):
        first = ("gate_up_proj", ("gate_proj", "up_proj")) if f"{place}/gate_proj" in kernels else None
        if first is None:  # gate and up in one here too, or no gate
            first = next((name, (name,)) for name in ("gate_up_proj", "up_proj") if f"{place}/{name}" in kernels)
        for name, ours in (first, ("down_proj", ("down_proj",))):
            modules = [f"{place}/{one}" for one in ours]
            columns, end = {}, 0
            for module in modules:
                layers, count, rows, width = keys[f"{module}/kernel"].our_shape
                columns[module], end = (end, end + width), end + width
            template = f"model.layers.{{}}.{_NAMES.get(spec.family, 'mlp.experts')}.{name}.weight"
            numbers = keys[f"{modules[0]}/kernel"].layers
            key = Key(template, (count, end, rows), (layers,), True, numbers)
            out[f"{place}/{name}"] = Parameter(key, columns, spec.family in _TURNED)
    return out


def outside(module: str) -> str:
    """The parameter, of `parameters`, that peft wraps outside this one, where both have adapters: the later one."""
    return f"{module.rpartition('/')[0]}/down_proj"


def wrapped(name: str, by_other: bool) -> str:
    """peft's name of the module that holds the adapter of the parameter `name`. It wraps the experts once for each; in
    the name of gate_up_proj's that shows where down_proj has one too (`by_other`).
    """
    module, _, parameter = name.rpartition(".")
    return f"{module}.base_layer" if by_other and parameter != "down_proj" else module
