"""Small vision-language models: configs, transformers' torch models of them, and rows with images for both."""

import copy
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from ftjax.models.spec import Vision
from support.tiny import batch_of

torch.set_num_threads(1)  # of so small matrices; more would wait for each other

IMAGE = 60  # the id of an image's tokens
_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GEMMA3 = {
    "model_type": "gemma3",
    "text_config": _TEXT
    | {
        "model_type": "gemma3_text",
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 20,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 12,
        "patch_size": 2,
        "vision_use_head": False,
    },
    "mm_tokens_per_image": 9,  # 6 x 6 patches, of 2 x 2 a token
    "image_token_index": IMAGE,
    "boi_token_index": 61,
    "eoi_token_index": 62,
    "tie_word_embeddings": True,
}
QWEN2_5_VL = {
    "model_type": "qwen2_5_vl",
    "text_config": _TEXT
    | {
        "model_type": "qwen2_5_vl_text",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e3, "mrope_section": [1, 1, 2]},
    },
    "vision_config": {
        "depth": 3,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_heads": 3,
        "patch_size": 2,
        "window_size": 8,  # 4 x 4 patches
        "fullatt_block_indexes": [1],
        "out_hidden_size": 32,
    },
    "image_token_id": IMAGE,
    "video_token_id": 63,
    "vision_start_token_id": 61,
    "vision_end_token_id": 62,
    "tie_word_embeddings": False,
}
CONFIGS = {"gemma3": GEMMA3, "qwen2_5_vl": QWEN2_5_VL}


def torch_model(config: dict, seed: int = 0) -> PreTrainedModel:
    """A float32 model in eval mode with eager attention, nothing of it left at its initial constant."""
    fields = copy.deepcopy({name: value for name, value in config.items() if name != "model_type"})
    made = AutoConfig.for_model(config["model_type"], **fields)
    model = AutoModelForImageTextToText.from_config(made, attn_implementation="eager").eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                fan_in = parameter.shape[0] if name.endswith("_projection_weight") else parameter[0].numel()
                parameter.normal_(std=fan_in**-0.5)
    return model


def images_at(rows: int, columns: int, patch: int, seed: int) -> np.ndarray:
    """uint8 [3, rows patch, columns patch]: an image of so many patches."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (3, rows * patch, columns * patch)).astype(np.uint8)


def patches_of(image: np.ndarray, patch: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [P, 3 p p], int32 [P, 2]) in the order of a batch: by blocks of merge x merge."""
    rows, columns = image.shape[1] // patch, image.shape[2] // patch
    order = [
        (block_row * merge + row, block_column * merge + column)
        for block_row in range(rows // merge)
        for block_column in range(columns // merge)
        for row in range(merge)
        for column in range(merge)
    ]
    cut = [image[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].reshape(-1) for r, c in order]
    return np.stack(cut), np.array(order, np.int32)


def image_arrays(rows: list[list[np.ndarray]], patch: int, merge: int, count: int) -> dict[str, np.ndarray]:
    """The arrays of a batch for the images of each of its rows, `count` patches a row."""
    batch = {
        "patches": np.zeros((len(rows), count, 3 * patch * patch), np.uint8),
        "patch_places": np.zeros((len(rows), count, 2), np.int32),
        "patch_images": np.zeros((len(rows), count), np.int32),
    }
    for row, images in enumerate(rows):
        start = 0
        for number, image in enumerate(images, 1):
            patches, places = patches_of(image, patch, merge)
            part = slice(start, start + len(patches))
            batch["patches"][row, part], batch["patch_places"][row, part] = patches, places
            batch["patch_images"][row, part] = number
            start += len(patches)
    return batch


class Pictured(NamedTuple):
    """A document with images."""

    tokens: np.ndarray  # int32 [n]
    trained: np.ndarray  # bool [n]
    images: list[np.ndarray]  # as of `images_at`


def pictured(vision: Vision, sizes: list[tuple[int, int]], texts: list[int], seed: int) -> Pictured:
    """Random text around images of `sizes`, in patches; texts: how many tokens before, between and behind them."""
    rng = np.random.default_rng(seed)
    parts = [rng.integers(0, IMAGE, texts[0])]
    for (rows, columns), text in zip(sizes, texts[1:], strict=True):
        parts += [np.full(rows * columns // vision.merge**2, IMAGE), rng.integers(0, IMAGE, text)]
    tokens = np.concatenate(parts).astype(np.int32)
    images = [images_at(*size, vision.patch, seed + number) for number, size in enumerate(sizes)]
    return Pictured(tokens, (np.arange(len(tokens)) > texts[0] // 2) & (tokens != IMAGE), images)


def torch_inputs(vision: Vision, doc: Pictured, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What transformers' model takes of one document alone, as its processor makes it of images of these sizes."""
    ids = torch.tensor(doc.tokens[None]).long()
    stands = (ids == vision.image_token).long()
    kind = {"gemma3": "token_type_ids"}.get(vision.family, "mm_token_type_ids")
    out = {"input_ids": ids, kind: stands}
    if not doc.images:
        return out
    mean, std = (torch.tensor(values, dtype=dtype)[:, None, None] for values in (vision.mean, vision.std))
    images = [(torch.tensor(image).to(dtype) / 255 - mean) / std for image in doc.images]
    if vision.family == "gemma3":
        return out | {"pixel_values": torch.stack(images)}
    patches, grids = [], []
    for image in images:
        cut, _ = patches_of(image.numpy(), vision.patch, vision.merge)
        cut = torch.tensor(cut).reshape(len(cut), 3, 1, -1).repeat(1, 1, vision.frames, 1)
        patches.append(cut.reshape(len(cut), -1))
        grids.append([1, image.shape[1] // vision.patch, image.shape[2] // vision.patch])
    return out | {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}


def rope_positions(model: PreTrainedModel, vision: Vision, doc: Pictured) -> np.ndarray:
    """int32 [n, 3]: as transformers gives them."""
    inputs = torch_inputs(vision, doc)
    if not doc.images:
        return np.repeat(np.arange(len(doc.tokens), dtype=np.int32)[:, None], 3, axis=1)
    found, _ = model.model.get_rope_index(
        inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )
    return found[:, 0].numpy().T.astype(np.int32)


def pictured_batch(
    model: PreTrainedModel, vision: Vision, rows: list[list[Pictured]], length: int, count: int
) -> dict[str, np.ndarray]:
    """As `tiny.batch_of`, with the arrays of images: `count` patches a row."""
    batch = batch_of([[(doc.tokens, doc.trained) for doc in docs] for docs in rows], length)
    batch |= image_arrays([[x for doc in docs for x in doc.images] for docs in rows], vision.patch, vision.merge, count)
    if vision.rope_theta is not None:
        batch["rope_positions"] = np.zeros((len(rows), length, 3), np.int32)
        for row, docs in enumerate(rows):
            found = [rope_positions(model, vision, doc) for doc in docs]
            end = sum(map(len, found))
            batch["rope_positions"][row, :end] = np.concatenate([*found, np.zeros((0, 3), np.int32)])
    return batch


def torch_logits(model: PreTrainedModel, vision: Vision, doc: Pictured) -> np.ndarray:
    """One document alone: [n, vocab]"""
    with torch.no_grad():
        return model(**torch_inputs(vision, doc)).logits[0].numpy()


def torch_gradients(model: PreTrainedModel, vision: Vision, docs: list[Pictured]) -> dict[str, torch.Tensor]:
    """In float64, of the summed loss of the trained tokens, each document run alone."""
    model = copy.deepcopy(model).double()
    for doc in docs:
        logits = model(**torch_inputs(vision, doc, torch.float64)).logits[0, :-1]
        ids = torch.tensor(doc.tokens, dtype=torch.long)
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        losses[torch.tensor(doc.trained[1:])].sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}
