"""What PEFT calls the parts of an adapter, and by which names its config finds the layers they belong to."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ftjax.errors import UserError
from ftjax.lora import FUSED, TOWER, linear_kernels
from ftjax.models.families import FAMILIES
from ftjax.models.groups import stacks
from ftjax.models.spec import DecoderSpec
from ftjax.weights.hf.keys import Key, hf_names
from ftjax.weights.peft import experts
from ftjax.weights.peft.experts import is_expert

PREFIX = "base_model.model."
EMBEDDING = "embed_tokens"  # our module
HEAD = "lm_head"  # ours and transformers', also where it is tied and so has no parameter

_FUSED = ("falcon_h1", "nemotron_h")  # families in which peft adapts nothing whose path has lora.FUSED


def adaptable(spec: DecoderSpec) -> dict[str, Key]:
    """{"layers/mlp/up_proj": the Key of its kernel}: the linear layers, the token embedding, and the
    parameters of experts (experts.py).
    """
    keys = hf_names(spec)
    paths = [*linear_kernels(keys), f"{EMBEDDING}/embedding"]
    of_experts = {name: parameter.key for name, parameter in experts.parameters(spec).items()}
    return {path.rpartition("/")[0]: keys[path] for path in paths} | of_experts


def is_conv1d(modules: dict[str, Key]) -> bool:
    """Whether linear layers are stored as [in, out] (GPT-2), which peft notes as fan_in_fan_out."""
    return not all(key.transposed for module, key in modules.items() if module != EMBEDDING)


def as_parameters(modules: Iterable[str], spec: DecoderSpec) -> set[str]:
    """Those of `modules` that peft can only be told of as parameters: experts, and dense or shared MLPs beside them.

    With transformers 5, peft takes any name that ends with "up_proj" for a part of a mixture's experts, which are one
    parameter there. Named by its weight in target_parameters a dense layer is left alone; its tensors are the same.
    """
    mixture = any(stack.spec.experts for stack in stacks(spec))
    beside = {module for module in modules if mixture and "/mlp/" in module and module.endswith("_proj")}
    return beside | set(filter(is_expert, modules))


def tensor_name(key: Key, multimodal: bool) -> str:
    """transformers' name of the parameter, with {} for the layer."""
    if key.template.startswith("backbone."):  # as Nemotron-H's files call the body
        return f"model.{key.template.removeprefix('backbone.')}"
    # A model with a vision tower beside it has the language model's body one level deeper.
    deeper = multimodal and key.template.startswith("model.") and not key.vision
    return key.template.replace("model.", "model.language_model.", 1) if deeper else key.template


def module_name(key: Key, multimodal: bool) -> str:
    """transformers' name of the module of the parameter, with {} for the layer."""
    return tensor_name(key, multimodal).rpartition(".")[0]


def parts(
    module: str, key: Key, place: tuple[int, ...], rank: int, dora: bool, multimodal: bool
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{"lora_a": (its name, its shape in the file), ...} of the adapter of one layer.

    A is [r, in] and B [out, r], whether the layer itself is stored as [out, in] or, as GPT-2's are, as [in, out].
    """
    name = PREFIX + key.numbered(module_name(key, multimodal), place)
    if module == EMBEDDING:
        rows, width = key.shape
        names = (f"{name}.lora_embedding_A", f"{name}.lora_embedding_B")
    else:
        width, rows = key.shape if key.transposed else key.shape[::-1]
        names = (f"{name}.lora_A.weight", f"{name}.lora_B.weight")
    found = {"lora_a": (names[0], (rank, rows)), "lora_b": (names[1], (width, rank))}
    return found | ({"lora_magnitude": (f"{name}.lora_magnitude_vector", (width,))} if dora else {})


def whole_name(key: Key, place: tuple[int, ...], multimodal: bool) -> str:
    """The name of a fully trained tensor, as peft saves what is in modules_to_save."""
    return PREFIX + key.numbered(tensor_name(key, multimodal), place)


Places = Mapping[str, list[tuple[int, ...]]]  # {module: the places of its layers (`Key.places`) that are adapted}


def layers_to_transform(places: Places, spec: DecoderSpec, multimodal: bool) -> list[int] | None:
    """For adapter_config.json: the numbers of the adapted layers, where not all are and the numbers say which.

    None where all are, and where peft does not ask for numbers or they are not the same for all modules; then the names
    of `target_modules` say it.
    """
    keys, names = adaptable(spec), _names(spec, multimodal)
    others = {name for module, (name, _) in names.items() if module not in places}
    if multimodal or as_parameters(places, spec) or any(names[module][0] in others for module in places):
        return None
    chosen = {module: {keys[module].layers[place[0]] for place in its if place} for module, its in places.items()}
    numbers = set().union(*chosen.values())
    if not _partial(places, spec) or any(
        not keys[module].layers or its != numbers.intersection(keys[module].layers) for module, its in chosen.items()
    ):
        return None
    return sorted(numbers)


def _partial(places: Places, spec: DecoderSpec) -> set[str]:
    """The modules that are not adapted in every layer."""
    keys = adaptable(spec)
    return {module for module, its in places.items() if len(its) < len(keys[module].places())}


def target_modules(places: Places, spec: DecoderSpec, multimodal: bool) -> list[str]:
    """For adapter_config.json: names that peft finds in the adapted layers of the model and in no others, with
    `layers_to_transform` where that is not None.

    peft takes a name for every module that is it or ends with a dot and it. So a name is as short as it can be:
    "q_proj", but "attn.c_proj" where GPT-2's other c_proj is not adapted. A multimodal model has a vision tower with
    such names too, and gets whole names, one for each layer; so do layers of one stack alone, where those of another
    have the same names. Without those of `target_parameters`.
    """
    return _listed(set(places) - as_parameters(places, spec), spec, multimodal, True, places)


def target_parameters(places: Places, spec: DecoderSpec, multimodal: bool) -> list[str]:
    """Likewise the parameters of those in `as_parameters`."""
    modules = as_parameters(places, spec)
    of_experts = set(filter(is_expert, modules))
    dense = [f"{name}.weight" for name in _listed(modules - of_experts, spec, multimodal, True, places)]
    return sorted([*dense, *_listed(of_experts, spec, multimodal, True, places)])


def modules_to_save(modules: Iterable[str], spec: DecoderSpec, multimodal: bool) -> list[str]:
    """Likewise for modules_to_save, where peft takes "norm" for "input_layernorm", too: no dot is asked for."""
    return _listed(modules, spec, multimodal, dotted=False)


def patterns(modules: Iterable[str], spec: DecoderSpec, multimodal: bool) -> list[str]:
    """Keys of rank_pattern for `modules` of one name in all their layers.

    To peft each is a regular expression of the end of a name, which is a parameter's for those in `as_parameters`.
    """
    end = _end(modules, spec)
    if not multimodal:
        return [re.escape(name) + end for name in _listed(modules, spec, multimodal, dotted=True)]
    names = _names(spec, multimodal)
    return sorted({re.escape(names[module][0]).replace(r"\{\}", r"\d+") + end for module in modules})


def patterns_of_layers(
    module: str, places: Iterable[tuple[int, ...]], spec: DecoderSpec, multimodal: bool
) -> list[str]:
    """Keys of rank_pattern for each of these layers of the module alone."""
    end, key = _end([module], spec), adaptable(spec)[module]
    return [re.escape(key.numbered(module_name(key, multimodal), place)) + end for place in places]


def _end(modules: Iterable[str], spec: DecoderSpec) -> str:
    """What a pattern has after the name of these modules, which are of one kind."""
    return r"\.weight" if as_parameters(modules, spec) and not any(map(is_expert, modules)) else ""


def layer_names(key: Key, multimodal: bool) -> list[str]:
    """transformers' names of a parameter's module in each layer, in the order of `key.places()`."""
    return [key.numbered(module_name(key, multimodal), place) for place in key.places()]


def parameter_names(module: str, key: Key, multimodal: bool) -> list[str]:
    """The same of the parameter of one of those in `as_parameters`."""
    names = layer_names(key, multimodal)
    return names if is_expert(module) else [f"{name}.weight" for name in names]


def _names(spec: DecoderSpec, multimodal: bool) -> dict[str, tuple[str, Key]]:
    """{our module: transformers' name of it, with {} for the layer}, of all that have parameters; of experts as in
    `adaptable`.
    """
    plain = {path.rpartition("/")[0]: key for path, key in hf_names(spec).items() if not is_expert(path)}
    keys = plain | {name: parameter.key for name, parameter in experts.parameters(spec).items()}
    return {module: (module_name(key, multimodal), key) for module, key in keys.items()}


def _listed(
    modules: Iterable[str], spec: DecoderSpec, multimodal: bool, dotted: bool, places: Places | None = None
) -> list[str]:
    """Names that mean these modules and no others: short ones where they can be told apart so, else of each layer.

    places: of all that are adapted, where `modules` are some of these.
    """
    modules, names = set(modules), _names(spec, multimodal)
    others = {name for module, (name, _) in names.items() if module not in modules}
    if not any(map(is_expert, modules)):  # beside experts as older releases of transformers have them, each a module
        stored = {path.rpartition("/")[0]: module_name(key, multimodal) for path, key in hf_names(spec).items()}
        others = {name for module, name in stored.items() if module not in modules}
    if places is not None and layers_to_transform(places, spec, multimodal) is None:
        others |= {names[module][0] for module in _partial(places, spec)}  # of layers that are not adapted
    found = set()
    for module in modules:
        name, key = names[module]
        if multimodal or name in others:
            its = key.places() if places is None else places[module]
            found |= {key.numbered(name, place) for place in its}
        else:
            found.add(_suffix(name, others, dotted))
    return sorted(found)


def _suffix(name: str, others: set[str], dotted: bool) -> str:
    """The shortest run of last parts of `name` with which none of `others` ends; not "0", which layers are called."""
    pieces, dot = name.split("."), "." if dotted else ""
    suffixes = (".".join(pieces[-length:]) for length in range(1, len(pieces) + 1) if not pieces[-length].isdigit())
    return next(one for one in suffixes if not any((dot + other).endswith(dot + one) for other in others))


def refuse_tower(path: Path, names: Iterable[str], spec: DecoderSpec) -> None:
    """UserError where tensors of an adapter, by their `names`, are of a vision tower, and `spec` has none."""
    towers = [family.vision.names for family in FAMILIES.values() if family.vision]
    parts = {name.split(".")[1] for names in towers for name in names.values()}
    of_tower = [name for name in sorted(names) if set(name.removeprefix(PREFIX).split(".")[:2]) & parts]
    if of_tower and spec.vision is None:
        raise UserError(
            f"{path}: {of_tower[0]} is of a vision tower, which the model here is read without; set "
            "config.model.vision=True, or use an adapter of the language model"
        )


def refuse_saved(names: Iterable[str]) -> None:
    """UserError where one of these modules that are trained whole is of a mixture or of a vision tower.

    peft has no copies of the former, and of the latter some that are in others, such as the norm of a projector.
    """
    if wrong := [name for name in names if name.startswith(TOWER)]:
        raise UserError(
            f"{wrong[0]}: parts of a vision tower that are trained whole are not written for peft; use --format merged "
            "or hf"
        )
    if wrong := [name for name in names if "/experts/" in name or "/router/" in name]:
        raise UserError(
            f"{wrong[0]}: peft's modules_to_save has no experts and routers; train adapters of them, or use --format "
            "merged or hf"
        )


def refuse_fused(modules: Iterable[str], spec: DecoderSpec) -> None:
    """UserError where one of these adapted modules is one that peft adapts in no model of the family."""
    wrong = [name for name in modules if spec.family in _FUSED and FUSED in f"/{name}/"]
    if wrong:
        raise UserError(
            f"{wrong[0]}: peft takes no adapter of it in a {spec.family} model; use --format merged or hf, or train "
            "with adapter.targets that leave it out, as all-linear does"
        )
