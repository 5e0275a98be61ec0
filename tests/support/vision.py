"""Small vision-language models: configs, transformers' torch models of them, and rows with images for both."""

import copy

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

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
CONFIGS = {"gemma3": GEMMA3}


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
