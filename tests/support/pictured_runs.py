"""Small vision-language models with tokenizers on disk, and rows about images for whole runs."""

import copy
import json
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerFast

from support.chat_templates import SPECIALS, make_tokenizer
from support.vision import CONFIGS, torch_model

COLORS = {"red": (230, 20, 20), "blue": (20, 20, 230), "green": (20, 200, 20), "brown": (120, 80, 20)}
_TOKENS = {
    "gemma3": ["<start_of_image>", "<image_soft_token>", "<end_of_image>"],
    "qwen2_5_vl": ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"],
}
_WRITTEN = {"gemma3": "<start_of_image>", "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>"}
_PREPARED = {
    "gemma3": {"size": {"height": 12, "width": 12}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "qwen2_5_vl": {"min_pixels": 16, "max_pixels": 400, "patch_size": 2, "merge_size": 2, "temporal_patch_size": 2},
}
_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{{ 'IMAGE' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    template = _TEMPLATE.replace("IMAGE", _WRITTEN[family])
    return make_tokenizer(template, specials=[*SPECIALS, *_TOKENS[family]])


def write_vision_model(path: Path, family: str) -> Path:
    """A random model as transformers saves it, with a tokenizer and its settings for images."""
    config, tokenizer = copy.deepcopy(CONFIGS[family]), tokenizer_of(family)
    config["text_config"] |= {"vocab_size": 400, "max_position_embeddings": 512}
    first, image, last = tokenizer.convert_tokens_to_ids(_TOKENS[family])
    if family == "gemma3":
        config |= {"image_token_index": image, "boi_token_index": first, "eoi_token_index": last}
    else:
        config |= {"image_token_id": image, "vision_start_token_id": first, "vision_end_token_id": last}
        config |= {"video_token_id": 0}
    torch_model(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(_PREPARED[family]))
    return path


def write_pictured_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Conversations whose answers are colors, which only an image says; every third is of two."""
    rng, folder = np.random.default_rng(seed), path.with_suffix("")
    folder.mkdir()
    rows = []
    for number in range(count):
        parts, named = [], []
        for k in range(2 if number % 3 == 2 else 1):
            name, size = rng.choice(list(COLORS)), rng.integers(8, 20, 2)
            noise = rng.integers(-15, 15, (*size, 3))
            pixels = np.clip(np.array(COLORS[str(name)]) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}_{k}.png")
            parts.append({"type": "image_url", "image_url": {"url": f"{folder.name}/{number}_{k}.png"}})
            named.append(str(name))
        user = {"role": "user", "content": [*parts, {"type": "text", "text": "Where is my lamp?"}]}
        rows.append({"messages": [user, {"role": "assistant", "content": " and ".join(named)}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
