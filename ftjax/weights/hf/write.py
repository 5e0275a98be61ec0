"""Fine-tuned parameters as a Hugging Face model directory."""

import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ftjax import lora, tree
from ftjax.distributed import is_first, together
from ftjax.models.families import FAMILIES, family_of, spec_from_config, text_config
from ftjax.models.routing import is_correction
from ftjax.models.spec import DecoderSpec
from ftjax.weights.hf.classifier import Head, classifier_config, module
from ftjax.weights.hf.files import PREPROCESSORS, inside, read_json
from ftjax.weights.hf.keys import hf_names
from ftjax.weights.hf.safetensors_write import Tensor, shards, write_safetensors
from ftjax.weights.hf.together import gather

# Keys of a base's config.json that are written under another name, or are wrong for the weights that are written.
_DROPPED = ("torch_dtype", "_name_or_path", "auto_map", "quantization_config")
# The base's own tokenizer files, none of which training changes. The chat template is the tokenizer's.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_PROCESSOR_FILES = (*PREPROCESSORS, "video_preprocessor_config.json")
# Those that name every token, so that the base's lack new ones.
_VOCABULARIES = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt")
# Settings of generation_config.json that have a meaning only with do_sample, and the values that switch them off.
_SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


def write_model(
    directory: Path,
    params: dict[str, Any],
    spec: DecoderSpec,
    config: dict[str, Any],
    adapters: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
    head: Head | None = None,
) -> None:
    """Writes config.json, generation_config.json and safetensors (sharded beyond the limit) into `directory`.

    Every process calls it alike and process 0 writes. Tensors (one layer's, one expert's) are gathered, merged, cast,
    written and read back one at a time, so the host needs no memory for more than one of them.

    params: the whole tree, of jax arrays on any devices or of NumPy arrays.
    config: the Hugging Face config they were loaded with; of a multimodal config the language model's part is written,
    but all of it where `spec` has the tower.
    adapters: the `lora` collection to merge, as `lora.merge` does it, in float32.
    generation: the base's generation_config.json; None: made from the token ids in `config`.
    dtype: of the tensors in the files; None keeps each array's own, as corrections of routers do anyway.
    head: of numbers, in the place of one for tokens, which `params` then has not; it is written as it is. Such a model
    generates nothing, and gets no generation_config.json.

    Raises UserError for NaN, infinite or, after a cast, too large values; ValueError when the parts do not belong
    together; OSError when a tensor reads back differently.
    """
    tied = {key: value for key, value in config.items() if key == "tie_word_embeddings"}
    config = _config(config, spec, np.dtype(dtype or tree.flatten(params)["embed_tokens/embedding"].dtype))
    check_fit(tree.flatten(params), spec, config)
    tensors = _tensors(params, adapters, spec, dtype)
    if head is not None:
        config = classifier_config(config | tied, head)
        tensors += head_tensors(head, spec)
    runs = shards(tensors, max_shard_bytes)
    files = ["model.safetensors"]
    if len(runs) > 1:
        files = [f"model-{number:05d}-of-{len(runs):05d}.safetensors" for number in range(1, len(runs) + 1)]
    for file, tensors in zip(files, runs):
        write_safetensors(directory / file, tensors)
    with together(f"writing {directory}"):
        if is_first():
            if len(runs) > 1:
                weight_map = {tensor.name: file for file, tensors in zip(files, runs) for tensor in tensors}
                total = sum(tensor.nbytes for tensors in runs for tensor in tensors)
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                write_json(directory / "model.safetensors.index.json", index)
            write_json(directory / "config.json", config)
            if head is None:
                write_json(directory / "generation_config.json", generation_config(config, generation))


def write_tokenizer(
    directory: Path, tokenizer: Any, base: Path, new_tokens: bool = False, new_padding: bool = False
) -> None:
    """The tokenizer as transformers saves it, replaced by the base's own files where `base` is a directory with them.

    So tokenizer.model is kept, which transformers does not save but llama.cpp's converter needs. `auto_map` is left
    out: it refers to code that is not written; and so is a chat template other than the tokenizer's. The end token is
    the tokenizer's, which may be another than the base's.

    new_tokens: the tokenizer has tokens that the base's files lack. new_padding: its padding token is not the base's.
    """
    tokenizer.save_pretrained(directory)
    if not base.is_dir():
        return
    for name in _TOKENIZER_FILES:
        source = inside(base, name)
        if not source.is_file() or (new_tokens and name in _VOCABULARIES):
            continue
        content = read_json(source) if name in ("tokenizer_config.json", "special_tokens_map.json") else {}
        ours = {key: value for key, value in content.items() if key != "auto_map"}
        if isinstance(content.get("chat_template"), str) and content["chat_template"] != tokenizer.chat_template:
            del ours["chat_template"]  # the run's own is in chat_template.jinja
        end = content.get("eos_token")
        if content and tokenizer.eos_token not in (None, end["content"] if isinstance(end, dict) else end):
            ours["eos_token"] = tokenizer.eos_token
        if content and new_padding:
            ours["pad_token"] = tokenizer.pad_token
        if ours != content:
            write_json(directory / name, ours)
        else:
            shutil.copyfile(source, directory / name)


def write_processor(directory: Path, base: Path) -> None:
    """The base's settings of how images are read, where `base` is a directory with them."""
    for name in _PROCESSOR_FILES:
        source = inside(base, name) if base.is_dir() else base / name
        if source.is_file():
            shutil.copyfile(source, directory / name)


def generation_config(config: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any]:
    """The content of generation_config.json: the `base` model's own, with the token ids of `config`.

    transformers refuses to save sampling settings beside do_sample false, which some published models have; the
    settings are kept, and do_sample is made true for them.
    """
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
    if base is None:
        return ids
    out = {**base, **{key: value for key, value in ids.items() if key == "eos_token_id" or key not in base}}
    if out.get("temperature") == 0:  # means greedy, which transformers says with do_sample
        return {key: value for key, value in out.items() if key not in _SAMPLING} | {"do_sample": False}
    if not out.get("do_sample") and any(out.get(key) not in (None, off) for key, off in _SAMPLING.items()):
        out["do_sample"] = True
    return out


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _config(config: dict[str, Any], spec: DecoderSpec, dtype: np.dtype) -> dict[str, Any]:
    config = config if spec.vision else text_config(config)
    config = {key: value for key, value in config.items() if key not in _DROPPED}
    config |= {"dtype": dtype.name, "tie_word_embeddings": spec.tie_word_embeddings}
    for name in ("text_config", "vision_config") if spec.vision else ():
        if name in config:
            inner = {key: value for key, value in config[name].items() if key not in (*_DROPPED, "dtype")}
            tied = {"tie_word_embeddings": spec.tie_word_embeddings} if "tie_word_embeddings" in inner else {}
            config[name] = inner | tied
    config.setdefault("architectures", [family_of(config).architecture])
    return config


def check_fit(leaves: Mapping[str, Any], spec: DecoderSpec, config: dict[str, Any]) -> None:
    """ValueError unless the parameters {path: array} and the config to write are those of `spec`."""
    if {path: leaf.shape for path, leaf in leaves.items()} != {p: key.our_shape for p, key in hf_names(spec).items()}:
        raise ValueError(f"the parameters to write are not those of {spec}")
    described = spec_from_config(config, spec.vision is not None)
    if described != spec:
        raise ValueError(f"the config to write describes {described}, the parameters {spec}")


def _tensors(params: dict[str, Any], adapters: dict[str, Any] | None, spec: DecoderSpec, dtype: Any) -> list[Tensor]:
    """In the order of our paths, and inside one of its layers and experts."""
    keys, leaves, parts = hf_names(spec), tree.flatten(params), tree.by_module(adapters or {})
    adapted = {path for path in leaves if path.endswith(("/kernel", "/embedding")) and path.rpartition("/")[0] in parts}
    if len(adapted) != len(parts):
        raise ValueError(f"adapters of modules that are not there: {sorted(parts)}")
    out = []
    for path, leaf in leaves.items():
        key, adapter = keys[path], parts[path.rpartition("/")[0]] if path in adapted else {}
        # In any other type experts would change places.
        kept = np.float32 if is_correction(path) and leaf.dtype == np.float32 else dtype or leaf.dtype
        for place in key.places():
            name = path.rpartition("/")[2]
            values = functools.partial(tensor_values, leaf, place, key.transposed, name, adapter)
            out.append(Tensor(written_name(key.name(place), spec), key.shape, np.dtype(kept), values))
    return out


def written_name(name: str, spec: DecoderSpec) -> str:
    """What transformers calls a tensor in the files that it writes, which with a tower is not what its module has."""
    prefixes = FAMILIES[spec.vision.family].vision.written_as if spec.vision else ()
    old, new = next((pair for pair in prefixes if name.startswith(pair[0])), ("", ""))
    return new + name.removeprefix(old)


def head_tensors(head: Head, spec: DecoderSpec) -> list[Tensor]:
    """A head of numbers as it stands in files, in float32."""
    name, float32 = module(spec.family, head.kind), np.dtype(np.float32)
    weight = Tensor(f"{name}.weight", head.shape, float32, functools.partial(tensor_values, head.kernel, (), True))
    if not head.of_tokens:
        return [weight]
    # transformers has a bias here, which it would leave at random where the files have none.
    zeros = np.zeros(head.shape[:1], np.float32)
    return [weight, Tensor(f"{name}.bias", zeros.shape, float32, lambda: zeros)]


def tensor_values(
    leaf: Any, place: tuple[int, ...], transposed: bool, name: str = "", adapter: Mapping[str, Any] | None = None
) -> np.ndarray:
    """leaf[place] as in the file, on process 0; merged with the adapter of the parameter `name`, if there is one."""
    values = gather(leaf, place)
    if adapter:
        parts = {part: gather(values, place) for part, values in adapter.items()}
        if is_first():
            merged = lora.merge({"layer": {name: values.astype(np.float32)}}, {"layer": parts})
            values = np.asarray(merged["layer"][name])
    return values.swapaxes(-1, -2) if transposed else values
