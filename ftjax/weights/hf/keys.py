"""Which Hugging Face tensor each parameter of ours is: the one table behind loading, writing and PEFT."""

import dataclasses
import functools
import itertools

import numpy as np

from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.models.families import FAMILIES
from ftjax.models.groups import LAYERS, stack_of
from ftjax.models.params import shapes
from ftjax.models.spec import DecoderSpec

FLOATS = ("float64", "float32", "float16", "bfloat16")  # what weights may be stored as
_LEAVES = {"kernel": ".weight", "embedding": ".weight", "scale": ".weight", "bias": ".bias"}


@dataclasses.dataclass(frozen=True)
class Key:
    """One parameter of ours as it is called, laid out and shaped in Hugging Face files.

    `template` has a `{}` for each of our leading dimensions, `stack`, that the files split into tensors: the layer,
    and the expert where each has its own. `shape` is that of one Hugging Face tensor: [out, in] for a linear layer
    or [experts, out, in], which `transposed` says ours ([in, out]) is the transpose of. `layers` has Hugging Face's
    number of each layer in our stack; () outside the layers. `vision`: it is of the tower beside the language model.
    """

    template: str
    shape: tuple[int, ...]
    stack: tuple[int, ...] = ()
    transposed: bool = False
    layers: tuple[int, ...] = ()
    vision: bool = False

    def places(self) -> list[tuple[int, ...]]:
        """The indices into our leading dimensions, one per Hugging Face tensor, in order: [()] where there are none."""
        return list(itertools.product(*map(range, self.stack)))

    def numbered(self, template: str, place: tuple[int, ...]) -> str:
        """`template`, which has a {} for each leading dimension, for one place, with Hugging Face's layer number."""
        return template.format(*((self.layers[place[0]], *place[1:]) if self.layers else place))

    def name(self, place: tuple[int, ...]) -> str:
        return self.numbered(self.template, place)

    def names(self) -> list[str]:
        """The Hugging Face names, in the order of `places`."""
        return [self.name(place) for place in self.places()]

    @property
    def our_shape(self) -> tuple[int, ...]:
        """The shape of our parameter: [L, in, out], [L, E, in, out], [L, D], [V, D], ..."""
        return (*self.stack, *(flipped(self.shape) if self.transposed else self.shape))


@functools.lru_cache(maxsize=16)
def hf_names(spec: DecoderSpec) -> dict[str, Key]:
    """{path of a parameter: its Key}, "layers/mlp/up_proj/kernel" -> "model.layers.{}.mlp.up_proj.weight".

    The shapes are those that the decoder itself declares; the names are Llama's but for what the family says, of a
    parameter in any stack of layers under the name that it has where layers are alike.
    """
    family, tower = FAMILIES[spec.family], FAMILIES[spec.vision.family].vision if spec.vision else None
    names = family.names if tower is None else {**family.names, **tower.names}
    keys = {}
    for path, shape in shapes(Decoder(spec)).items():
        of = stack_of(spec, path)
        plain = LAYERS + path.removeprefix(of.path) if of else path
        template = names.get(plain) or _llama_name(plain)
        stack, inner = shape[: template.count("{}")], shape[template.count("{}") :]
        transposed = path.endswith("/kernel") and plain not in family.as_stored
        shape, layers = flipped(inner) if transposed else inner, of.layers if of else ()
        keys[path] = Key(template, shape, stack, transposed, layers, path.startswith("vision/"))
    return keys


def flipped(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of each matrix's transpose: [..., out, in] -> [..., in, out]."""
    return (*shape[:-2], *reversed(shape[-2:]))


def _llama_name(path: str) -> str:
    module, _, leaf = path.rpartition("/")
    if module.startswith("layers/"):
        module = module.replace("layers/", "layers/{}/", 1)
    prefix = "" if module == "lm_head" else "model."
    return prefix + module.replace("/", ".") + _LEAVES.get(leaf, f".{leaf}")


def finite_cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`values` as `dtype`; UserError naming the tensor if one is NaN or infinite, before or by the cast."""
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(dtype, copy=False)
    if np.isfinite(cast).all():
        return cast
    wrong = np.count_nonzero(~np.isfinite(values))
    if wrong:
        raise UserError(f"{name}: {wrong} of {values.size} values are NaN or infinite; get the weights again")
    raise UserError(f"{name}: holds values too large for {np.dtype(dtype).name}; choose bfloat16 or float32")
