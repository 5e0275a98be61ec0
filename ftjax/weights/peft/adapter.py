"""Adapters as PEFT directories: `adapter_config.json`, `adapter_model.safetensors`, and our own `ftjax_adapter.json`.

`peft` itself loads with strict=False and is silent about keys that do not fit; here each one is an error.
`ftjax_adapter.json` has a digest of the base, by which an adapter of another base with the same shapes is noticed.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ftjax import lora, tree
from ftjax.distributed import is_first, together
from ftjax.errors import UserError
from ftjax.models.families import inside_multimodal
from ftjax.models.spec import DecoderSpec
from ftjax.tree import Tree
from ftjax.weights.hf import classifier
from ftjax.weights.hf.classifier import Head
from ftjax.weights.hf.files import inside, read_json
from ftjax.weights.hf.keys import FLOATS, Key, finite_cast, hf_names
from ftjax.weights.hf.safetensors import SafetensorsFile
from ftjax.weights.hf.safetensors_write import Tensor, write_safetensors
from ftjax.weights.hf.together import gather, new_directory_together
from ftjax.weights.hf.write import head_tensors, tensor_values, write_json
from ftjax.weights.load import stored_names
from ftjax.weights.peft import config as peft_config
from ftjax.weights.peft import expert_adapters, experts
from ftjax.weights.peft import keys as peft_keys
from ftjax.weights.peft.config import LoraSettings
from ftjax.weights.peft.keys import EMBEDDING, HEAD, PREFIX
from ftjax.weights.source import Reader

CONFIG, WEIGHTS, FACTS = "adapter_config.json", "adapter_model.safetensors", "ftjax_adapter.json"
_SAMPLE = 4096  # the most values of a tensor that go into the digest of a base


class BaseFacts(NamedTuple):
    """The base of an adapter, as ftjax_adapter.json describes it; `digest` is from `base_digest`."""

    name: str
    digest: str
    quantized: str = "none"  # how the frozen kernels were stored in training
    revision: str = ""  # the commit, of a base from the Hub


def base_digest(reader: Reader, spec: DecoderSpec) -> str:
    """sha256 of the middle of every tensor of a language model (of one expert in a layer), as float32.

    A few kilobytes of each are read, enough to tell any two trainings apart. The same model in another precision has
    another digest.
    """
    sha256, stored = hashlib.sha256(), stored_names(reader)
    for key in hf_names(dataclasses.replace(spec, vision=None)).values():
        for place in key.places():
            name = key.name(place)
            if any(place[1:]) or name not in stored:  # loading the weights reports missing tensors
                continue
            shape = reader.shape(stored[name])
            middle = (slice(shape[0] // 2, shape[0] // 2 + 1) if len(shape) > 1 else slice(0, _SAMPLE),)
            values = reader.read(stored[name], middle if shape else ()).astype(np.float32).reshape(-1)[:_SAMPLE]
            sha256.update(f"{name} {list(shape)}".encode() + np.ascontiguousarray(values, "<f4").tobytes())
    return sha256.hexdigest()


def directory_digest(path: Path) -> str:
    """sha256 of an adapter's two files, and of what is noted of experts; UserError where one is absent."""
    _refuse_run(Path(path))
    sha256 = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        file = inside(Path(path), name)
        if not file.is_file():
            raise UserError(f"{file}: no such file; is {path} the directory of an adapter?")
        with file.open("rb") as opened:
            sha256.update(hashlib.file_digest(opened, "sha256").digest())
    if noted := _facts(Path(path)).get("experts"):  # by which their ranks are read
        sha256.update(json.dumps(noted, sort_keys=True).encode())
    return sha256.hexdigest()


def _facts(path: Path) -> dict[str, Any]:
    """The content of ftjax_adapter.json, {} where there is none."""
    return read_json(inside(path, FACTS)) if inside(path, FACTS).is_file() else {}


def embedding_rows(path: Path) -> int:
    """How many tokens the embedding or output head has that an adapter holds whole; 0 where it holds neither."""
    file = inside(Path(path).expanduser(), WEIGHTS)
    if not file.is_file():
        return 0  # which `open_adapter` reports
    stored = SafetensorsFile(file)
    tables = tuple(f".{name}.weight" for name in (EMBEDDING, "wte", HEAD))
    return max((stored.shape(name)[0] for name in stored.names() if name.endswith(tables)), default=0)


def write_adapter(
    out: Path,
    adapters: Tree,
    spec: DecoderSpec,
    base: BaseFacts,
    rslora: bool = False,
    saved: Mapping[str, Any] | None = None,
    multimodal: bool = False,
    card: str | None = None,
    generation: dict[str, Any] | None = None,
    save_tokenizer: Callable[[Path], None] | None = None,
    head: Head | None = None,
) -> None:
    """Writes the `lora` collection (see `ftjax.lora`) as a PEFT adapter.

    Every process calls it alike and process 0 writes (see `together`). The directory is written beside `out`, read
    back, and renamed. Ranks follow from the shapes, alphas from `lora_scale` by the formula that `rslora` selects.
    PiSSA's adapters become the difference from the original base, of twice the rank.

    saved: {path: parameter} of the modules that were trained whole, written in their own dtype.
    multimodal: whether transformers has the base's language model inside another model (Gemma 3).
    card: the text of README.md.
    generation: the content of generation_config.json, where the base's own does not do.
    save_tokenizer: writes a tokenizer that is not the base's into a directory.
    head: of numbers, which makes it the adapter of a ...ForSequenceClassification or ...ForTokenClassification.

    Raises UserError when `out` exists and is not empty, for NaN or infinite values, for experts and routers that were
    trained whole, and for unlike scales of experts' gate and up; ValueError when the adapters do not belong to `spec`.
    """
    spec = spec if head is None else _without_token_head(spec)
    keys, params = peft_keys.adaptable(spec), hf_names(spec)
    everything, saved = tree.by_module(adapters), dict(saved or {})
    peft_keys.refuse_saved(saved)
    peft_keys.refuse_fused(everything, spec)
    joined = expert_adapters.joined(everything, spec)
    of_experts = {module for its in joined.values() for module in its.adapters}
    modules = {module: parts for module, parts in everything.items() if module not in of_experts}
    if not everything or not keys.keys() >= modules.keys() or not params.keys() >= saved.keys():
        raise ValueError(f"no adapters, or adapters of modules that can have none: {sorted([*modules, *saved])}")
    dora = any("lora_magnitude" in parts for parts in modules.values())
    tensors, layers = [], {}
    for module, parts in modules.items():
        _check_parts(module, parts, keys[module], dora)
        rank = rank_of(parts)
        scales = {place: float(gather(parts["lora_scale"], place, everywhere=True)) for place in keys[module].places()}
        layers[module] = {place: (rank, scale) for place, scale in scales.items() if scale}
        for place in layers[module]:
            named = peft_keys.parts(module, keys[module], place, rank, dora, multimodal)
            for part, (name, shape) in named.items():
                values = functools.partial(_part, parts, part, place)
                tensors.append(Tensor(name, shape, np.dtype(parts[part].dtype), values))
    layers |= {module: its.layers() for module, its in joined.items()}
    for module, its in joined.items():
        for place, (rank, _) in layers[module].items():
            name = PREFIX + keys[module].numbered(peft_keys.module_name(keys[module], multimodal), place)
            name = experts.wrapped(name, place in layers.get(experts.outside(module), {}))
            for part, (tensor, shape) in its.parameter.parts(name, rank).items():
                tensors.append(Tensor(tensor, shape, its.dtype(part), functools.partial(its.part, part, place)))
    for path, leaf in saved.items():
        if leaf.shape != params[path].our_shape:
            raise ValueError(f"{path} has the shape {leaf.shape}, not {params[path].our_shape}")
        for place in params[path].places():
            values = functools.partial(tensor_values, leaf, place, params[path].transposed)
            name = peft_keys.whole_name(params[path], place, multimodal)
            tensors.append(Tensor(name, params[path].shape, np.dtype(leaf.dtype), values))
            if path == f"{EMBEDDING}/embedding" and spec.tie_word_embeddings:
                tensors.append(Tensor(f"{PREFIX}{HEAD}.weight", params[path].shape, np.dtype(leaf.dtype), values))
    if head is not None:
        tensors += [dataclasses.replace(its, name=PREFIX + its.name) for its in head_tensors(head, spec)]
    dropouts = {module: parts["lora_dropout"] for module, parts in modules.items() if "lora_dropout" in parts}
    rates = {float(gather(leaf, keys[module].places()[0])) for module, leaf in dropouts.items()}
    layers = {module: of_layers for module, of_layers in layers.items() if of_layers}
    config = peft_config.adapter_config(
        layers,
        {path.rpartition("/")[0] for path in saved},
        spec,
        rslora,
        dora,
        float(str(np.float32(max(rates, default=0.0)))),  # its shortest decimal
        base.name,
        multimodal,
        head and head.kind,
    )
    if base.revision:
        config["revision"] = base.revision
    facts = {"version": 1, "base_model": base.name, "base_sha256": base.digest, "base_quantized": base.quantized}
    if joined:
        facts["experts"] = {module: its.ranks for module, its in joined.items()}
    if head is not None:
        facts[classifier.FACTS] = dict(head.facts) | {"pad_token_id": head.pad}
    with new_directory_together(out) as directory:
        write_safetensors(directory / WEIGHTS, tensors)
        with together(f"writing {directory}"):
            if is_first():
                write_json(directory / CONFIG, config)
                write_json(directory / FACTS, facts)
                if generation is not None:
                    write_json(directory / "generation_config.json", generation)
                if card is not None:
                    (directory / "README.md").write_text(card, encoding="utf-8")
                if save_tokenizer is not None:
                    save_tokenizer(directory)


def _check_parts(module: str, parts: Mapping[str, Any], key: Key, dora: bool) -> None:
    wanted = {"lora_a", "lora_b", "lora_scale"} | ({"lora_magnitude"} if dora else set())
    further = parts.keys() - wanted - {"lora_dropout", "lora_a0", "lora_b0"}
    if further or not wanted <= parts.keys() or ("lora_a0" in parts) != ("lora_b0" in parts):
        raise ValueError(f"{module}: these are not the parts of an adapter: {sorted(parts)}")
    rank, (rows, columns) = parts["lora_a"].shape[-1], key.our_shape[-2:]
    shapes = {"lora_a": (rows, rank), "lora_b": (rank, columns), "lora_scale": (), "lora_magnitude": (columns,)}
    shapes |= {"lora_a0": shapes["lora_a"], "lora_b0": shapes["lora_b"], "lora_dropout": ()}
    if wrong := [part for part, leaf in parts.items() if leaf.shape != (*key.stack, *shapes[part])]:
        raise ValueError(f"{module}/{wrong[0]} has the shape {parts[wrong[0]].shape}, not that of the kernel's adapter")


def rank_of(parts: Mapping[str, Any]) -> int:
    """The rank of an adapter on disk; PiSSA's, being a difference, has twice that of training."""
    return parts["lora_a"].shape[-1] * (2 if "lora_a0" in parts else 1)


def _part(parts: Mapping[str, Any], part: str, place: tuple[int, ...]) -> np.ndarray:
    """One layer's part as in the file, [r, in] or [out, r].

    A PiSSA adapter changed its base by the initial A0 B0, so it is A B - A0 B0, as one product of twice the rank.
    """
    values = gather(parts[part], place)
    if part == "lora_a" and "lora_a0" in parts:
        values = np.concatenate([values, gather(parts["lora_a0"], place)], axis=1)
    if part == "lora_b" and "lora_b0" in parts:
        values = np.concatenate([values, -gather(parts["lora_b0"], place)], axis=0)
    return values.T


@dataclasses.dataclass(frozen=True)
class StoredAdapter:
    """A PEFT directory that fits a model; `read` reads its tensors."""

    path: Path
    config: dict[str, Any]
    settings: LoraSettings
    modules: dict[str, Key]  # the adapted modules
    ranks: dict[str, list[int]]  # {module: the rank in each of its layers, 0 where it is not adapted}
    layers: dict[str, list[str]]  # {module: the name of each layer, by which peft's patterns find it}
    saved: dict[str, Key]  # parameters that were trained whole
    multimodal: bool
    copies: dict[str, str]  # copies of the base's tensors: {name here: Hugging Face's name}
    file: SafetensorsFile
    experts: tuple[
        expert_adapters.Stored, ...
    ] = ()  # of `modules`, `ranks` and `layers` those of experts, as they are stored
    kind: str | None = None  # of a model with a head of numbers, see `weights.hf.classifier`; None: it is for tokens

    def rank(self, module: str) -> int:
        return max(self.ranks[module])

    @property
    def in_all_layers(self) -> bool:
        """Whether every module is adapted in each of its layers."""
        return all(map(all, self.ranks.values()))

    @property
    def layer_numbers(self) -> set[int]:
        """Hugging Face's numbers of the layers in which something is adapted."""
        return {
            key.layers[place[0]]
            for module, key in self.modules.items()
            for place, rank in zip(key.places(), self.ranks[module], strict=True)
            if rank and key.layers
        }

    def read(self) -> tuple[Tree, dict[str, np.ndarray]]:
        """(the `lora` collection, {path: parameter trained whole}), float32.

        Where peft's patterns give the layers of a module different ranks, the smaller ones are padded with zeros in
        both A and B. The gradient of each is a product with the other, so the padding stays zero in training. A layer
        that is not adapted has zeros alone (see `lora.only_in_layers`).
        """
        lora_leaves: dict[str, list[np.ndarray]] = {}
        settings = self.settings
        of_experts = {path: leaf for its in self.experts for path, leaf in its.read(self._read).items()}
        for module, key in self.modules.items():
            if experts.is_expert(module):
                continue
            for place, rank, layer in zip(key.places(), self.ranks[module], self.layers[module], strict=True):
                tensors = peft_keys.parts(module, key, place, rank, settings.dora, self.multimodal)
                for part, (name, shape) in tensors.items():
                    missing = self.rank(module) - rank
                    pad = {"lora_a": [(0, 0), (0, missing)], "lora_b": [(0, missing), (0, 0)]}.get(part, [(0, 0)])
                    values = self._read(name).T if rank else np.zeros(shape[::-1], np.float32)
                    lora_leaves.setdefault(f"{module}/{part}", []).append(np.pad(values, pad))
                alpha = peft_config.by_pattern(settings.alpha_pattern, layer, settings.alpha)
                scale = np.float32(lora.scale(rank, alpha, settings.rslora) if rank else 0)
                lora_leaves.setdefault(f"{module}/lora_scale", []).append(scale)
        out = {}
        for path, of_layers in lora_leaves.items():
            stack = self.modules[path.rpartition("/")[0]].stack
            out[path] = np.stack(of_layers).reshape((*stack, *np.shape(of_layers[0])))
        out |= of_experts
        saved = {}
        for path, key in self.saved.items():
            values = [self._read(peft_keys.whole_name(key, place, self.multimodal)) for place in key.places()]
            saved[path] = np.stack([v.swapaxes(-1, -2) if key.transposed else v for v in values]).reshape(key.our_shape)
        return tree.unflatten(out), saved

    def width(self) -> int:
        """How many numbers its head gives, where `kind` says that it has one."""
        return self.file.shape(self._head_name)[0]

    def head(self) -> np.ndarray:
        """float32 [D, K]: its head of numbers; UserError for one with a bias, which heads here have not."""
        return classifier.read_head(self.file, self._head_name)

    @property
    def _head_name(self) -> str:
        names = (f"{PREFIX}{name}.weight" for name in classifier.MODULES)
        return next(name for name in names if name in self.file.names())

    def check_base(self, base: BaseFacts, reader: Reader) -> None:
        """UserError if this adapter was trained on another base.

        ftjax_adapter.json says so, or the copies of the base's tensors that peft keeps beside adapters of embeddings.
        Without either, only the shapes are known to fit.
        """
        facts = _facts(self.path)
        wrong = facts.get("base_sha256", base.digest) != base.digest
        stored = stored_names(reader)
        for name, original in self.copies.items():
            theirs, ours = self.file.read(name), reader.read(stored[original])
            wrong = wrong or not np.array_equal(theirs.astype(np.float32), ours.astype(theirs.dtype).astype(np.float32))
        if wrong:
            trained_on = facts.get("base_model", self.settings.base_name)
            raise UserError(
                f"{self.path}: this adapter was trained on {trained_on!r}, and the model here, {base.name!r}, has the "
                "same shapes but other weights; use the base it was trained on (or, if this is the same model in "
                f"another precision, remove {FACTS})"
            )

    def _read(self, name: str) -> np.ndarray:
        return finite_cast(self.file.read(name), np.dtype(np.float32), f"{self.file.path}: {name}")


def open_adapter(path: Path, spec: DecoderSpec) -> StoredAdapter:
    """A PEFT directory for a base of `spec`; reads the config and the header.

    Raises UserError for settings that are not supported, by name, and with a complete list for tensors that are
    missing, of another shape or not used.
    """
    path = Path(path).expanduser()
    _refuse_run(Path(path))
    config = read_json(inside(path, CONFIG))
    kind = peft_config.kind_of(config)
    spec = spec if kind is None else _without_token_head(spec)
    keys = peft_keys.adaptable(spec)
    settings = peft_config.read_settings(path, config, spec, peft_keys.is_conv1d(keys))
    file = inside(path, WEIGHTS)
    if not file.is_file():
        also = "; adapter_model.bin is a pickle and never opened" if (path / "adapter_model.bin").exists() else ""
        raise UserError(f"{file}: no such file{also}; save the adapter as safetensors (peft's default)")
    stored = SafetensorsFile(file)
    peft_keys.refuse_tower(path, stored.names(), spec)
    multimodal = inside_multimodal(spec) and any(".language_model." in name for name in stored.names())
    expected: dict[str, tuple[int, ...]] = {}
    modules, ranks, layers, copies = {}, {}, {}, {}
    parameters = peft_keys.as_parameters(keys, spec) if config.get("target_parameters") else set()
    of_experts = expert_adapters.stored(_facts(path), config, settings, spec, multimodal)
    for its in of_experts:
        for module in its.modules:
            modules[module], layers[module] = its.parameter.key, its.whole
            ranks[module] = [its.rank_of(module, rank) for rank in its.ranks]
        for name, rank in zip(its.names, its.ranks, strict=True):
            expected |= dict(its.parameter.parts(name, rank).values()) if rank else {}
    for module, key in keys.items():
        if experts.is_expert(module):
            continue
        template = peft_keys.module_name(key, multimodal)
        names = [f"{name}.weight" if module in parameters else name for name in peft_keys.layer_names(key, multimodal)]
        of_layers = [peft_config.by_pattern(settings.rank_pattern, name, settings.rank) for name in names]
        tensors = [
            dict(peft_keys.parts(module, key, place, rank, settings.dora, multimodal).values())
            for place, rank in zip(key.places(), of_layers)
        ]
        named = [peft_config.is_target(name, config, module in parameters) for name in names]
        if not any(named) and not any(its.keys() & stored.names() for its in tensors):
            continue
        if not any(named):  # by a regular expression, which is not followed here: it is every layer that can be meant
            named = [peft_config.in_chosen_layers(name, config) for name in names]
        modules[module], layers[module] = key, names
        ranks[module] = [rank if adapted else 0 for rank, adapted in zip(of_layers, named)]
        for its in itertools.compress(tensors, named):
            expected |= its
        if module in (EMBEDDING, HEAD) and (copy := f"{PREFIX}{template}.base_layer.weight") in stored.names():
            copies[copy], expected[copy] = key.name(()), key.shape
    saved = _saved(settings, spec, multimodal)
    for key in saved.values():
        expected |= {peft_keys.whole_name(key, place, multimodal): key.shape for place in key.places()}
    if kind is not None:
        expected |= _head_shapes(stored, kind, spec)
    head, tied = f"{PREFIX}{HEAD}.weight", spec.tie_word_embeddings and f"{EMBEDDING}/embedding" in saved
    if tied:
        expected[head] = keys[EMBEDDING].shape
    problems = _problems(stored, expected)
    adapted_names = [name for module, names in layers.items() for name in itertools.compress(names, ranks[module])]
    for name in ("rank_pattern", "alpha_pattern"):
        unused = peft_config.unmatched(getattr(settings, name), adapted_names)
        problems += [f"not used: {name} {pattern!r}" for pattern in unused]
    problems += [f"not used: modules_to_save {name!r}" for name in _unused(settings, spec, saved, multimodal, kind)]
    if not modules:
        problems.append("it adapts no layer of the model that can have an adapter here")
    if settings.dora and EMBEDDING in modules:
        problems.append("use_dora: DoRA of the token embedding is not supported")
    if spec.tie_word_embeddings and EMBEDDING in modules and settings.ensure_weight_tying:
        problems.append("ensure_weight_tying: here the adapter of a tied embedding is not one of the head")
    if problems:
        raise UserError(
            "\n  ".join([f"{file}: this adapter does not fit the model:", *problems])
            + "\nUse the base that it was trained on, and an adapter of linear layers; a tied head is trained as "
            "modules_to_save with ensure_weight_tying."
        )
    if tied:
        embedding = peft_keys.whole_name(saved[f"{EMBEDDING}/embedding"], (), multimodal)
        if not np.array_equal(stored.read(embedding), stored.read(head)):
            raise UserError(
                f"{file}: its embedding and output head were trained apart, which are one in this model; train it "
                "with ensure_weight_tying"
            )
    return StoredAdapter(
        path, config, settings, modules, ranks, layers, saved, multimodal, copies, stored, of_experts, kind
    )


def _refuse_run(path: Path) -> None:
    if (path / "checkpoints").is_dir():
        raise UserError(
            f"{path} is a run, not an adapter; take one out of it: python -m ftjax.export --workdir {path} --step best "
            "--format peft --out ADAPTER (best, latest or a number), and give that directory"
        )


def _saved(settings: LoraSettings, spec: DecoderSpec, multimodal: bool) -> dict[str, Key]:
    """The parameters that modules_to_save names, as in peft: by any end of their module's name, even within a word."""
    saved = {
        path: key
        for path, key in hf_names(spec).items()
        if any(peft_keys.layer_names(key, multimodal)[0].endswith(name) for name in settings.modules_to_save)
    }
    peft_keys.refuse_saved(list(saved))
    return saved


def _without_token_head(spec: DecoderSpec) -> DecoderSpec:
    """The spec as peft sees a model with a head of numbers: nothing is tied to its embedding."""
    return dataclasses.replace(spec, tie_word_embeddings=False)


def _head_shapes(stored: SafetensorsFile, kind: str, spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the head of numbers of such an adapter, of as many as there are."""
    name = f"{PREFIX}{classifier.module(spec.family, kind)}"
    weight, bias = f"{name}.weight", f"{name}.bias"
    width = stored.shape(weight)[0] if weight in stored.names() and stored.shape(weight) else 1
    return {weight: (width, spec.hidden_size)} | ({bias: (width,)} if bias in stored.names() else {})


def _unused(
    settings: LoraSettings, spec: DecoderSpec, saved: dict[str, Key], multimodal: bool, kind: str | None
) -> list[str]:
    modules = {name for key in saved.values() for name in peft_keys.layer_names(key, multimodal)}
    if spec.tie_word_embeddings and f"{EMBEDDING}/embedding" in saved:
        modules.add(HEAD)
    if kind is not None:
        modules |= set(classifier.MODULES)  # peft names both, whichever the model has
    return [name for name in settings.modules_to_save if not any(module.endswith(name) for module in modules)]


def _problems(stored: SafetensorsFile, expected: dict[str, tuple[int, ...]]) -> list[str]:
    problems = [f"missing: {name} {list(expected[name])}" for name in sorted(expected.keys() - stored.names())]
    problems += [f"not used: {name}" for name in sorted(stored.names() - expected.keys())]
    for name in sorted(expected.keys() & stored.names()):
        if stored.shape(name) != expected[name]:
            problems.append(f"shape: {name} is {list(stored.shape(name))}, needed is {list(expected[name])}")
        elif stored.dtype(name).name not in FLOATS:
            problems.append(f"type: {name} is {stored.dtype(name).name}, not floating point of 16 bits or more")
    return problems
