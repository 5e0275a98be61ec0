"""Where each tensor of a GGUF file belongs, and how its values differ from Hugging Face's."""

import functools
import itertools
from typing import NamedTuple

import gguf
import numpy as np

from ftjax.errors import UserError
from ftjax.models.spec import DecoderSpec
from ftjax.weights.hf.keys import Key, flipped, hf_names

_PERMUTED = ("llama", "granite", "smollm3")  # architectures whose heads llama.cpp turns in pairs of neighboring rows


class Place(NamedTuple):
    """One GGUF tensor: one layer of a parameter of ours, all its experts together.

    GGUF stores every kernel as [out, in], and those of experts as [experts, out, in]. Gate and up of experts, which
    GPT-OSS has in turns in one parameter, are two tensors there, the `parts` of it.
    """

    path: str  # of our parameter
    key: Key
    layer: tuple[int, ...]  # (layer in its stack,), or () for a parameter outside the layers
    heads: int | None  # rows of each of so many heads are interleaved (`half_split`)
    plus_one: bool  # a scale that is stored plus one
    flipped: bool  # Hugging Face stores it as [in, out]
    part: int = 0  # it holds the columns part, part + parts, ... of Hugging Face's last dimension
    parts: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """In the GGUF file: [out, in], [experts, out, in], [n], [experts, n] or, for embeddings, [rows, width]."""
        inner = (*self.key.shape[:-1], self.key.shape[-1] // self.parts)
        return (*self.key.stack[len(self.layer) :], *(flipped(inner) if self.flipped else inner))

    @property
    def split(self) -> bool:
        """Whether Hugging Face has a tensor of its own for each expert."""
        return len(self.key.stack) > len(self.layer)

    def hf_names(self) -> list[str]:
        """Hugging Face's names: one, or one per expert."""
        experts = itertools.product(*map(range, self.key.stack[len(self.layer) :]))
        return [self.key.name((*self.layer, *expert)) for expert in experts]


@functools.lru_cache(maxsize=4)
def gguf_places(spec: DecoderSpec, architecture: str) -> dict[str, Place]:
    """{name in a GGUF file: its Place}, for every parameter of the decoder.

    The names are those that the `gguf` library gives Hugging Face's, as llama.cpp's own converter asks it to.
    UserError for a parameter that the architecture lacks.
    """
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, spec.num_hidden_layers)
    heads = {"q_proj": spec.num_attention_heads, "k_proj": spec.num_key_value_heads}
    places = {}
    for path, key in hf_names(spec).items():
        templates = _templates(key.template)
        module, leaf = path.split("/")[-2:]
        for layer, part in itertools.product(itertools.product(*map(range, key.stack[:1])), range(len(templates))):
            name = table.get_name(key.numbered(templates[part], layer), try_suffixes=(".weight", ".bias"))
            if name is None:
                raise UserError(f"architecture {architecture!r} of GGUF has no place for {key.template}")
            places[name] = Place(
                path,
                key,
                layer,
                heads=heads.get(module) if architecture in _PERMUTED else None,
                plus_one=leaf == "scale" and spec.norm == "rms_plus_one",
                flipped=leaf == "kernel" and not key.transposed,
                part=part,
                parts=len(templates),
            )
    return places


def _templates(template: str) -> list[str]:
    """Hugging Face's name as the `gguf` library knows it: that of all experts, and of GPT-OSS's gate and up each."""
    name = template.replace("experts.{}.", "experts.")
    if not name.endswith((".weight", ".bias")):  # GPT-OSS's sinks and experts
        name = f"{name.removesuffix('_bias')}.bias" if name.endswith("_bias") else f"{name}.weight"
    if "experts.gate_up_proj" not in name:
        return [name]
    return [name.replace("gate_up_proj", half) for half in ("gate_proj", "up_proj")]


def half_split(rows: int, heads: int) -> np.ndarray:
    """int[rows]: which GGUF row is each Hugging Face row of a q or k projection.

    Inside a head GGUF interleaves the two halves that a rotation pairs (0, n/2, 1, n/2 + 1, ...); Hugging
    Face has one half after the other. No value changes, so rows may be reordered before they are dequantized.
    """
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)
