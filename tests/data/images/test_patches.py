"""The patches and positions of images: those of transformers' processors and of its Qwen2.5-VL."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import seeing
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ftjax.data.images.patches import patches, places, rope_positions
from ftjax.data.images.rules import rules_of

SIZES = [(50, 30), (31, 90), (9, 8), (40, 40), (300, 17)]


def unnormalized(values, processor):
    """The values of a processor as the pixels that they were made of."""
    mean, std = (np.array(part)[:, None, None] for part in (processor.image_mean, processor.image_std))
    return (np.asarray(values, np.float64) * std + mean) * 255


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_patches_on_a_grid_are_those_of_the_processor(size):
    image, rules, processor = seeing.picture(*size), seeing.qwen_rules(), seeing.qwen_processor().image_processor
    made = processor([image], return_tensors="np")
    rows, columns = rules.grid(*size)
    assert made["image_grid_thw"].tolist() == [[1, rows, columns]]
    theirs = made["pixel_values"].reshape(rows * columns, 3, 2, 4, 4)
    np.testing.assert_array_equal(theirs[:, :, 0], theirs[:, :, 1])  # two equal frames
    ours = patches(image, rules)
    assert ours.dtype == np.uint8
    # The processor's values are float32: they differ from whole numbers by 4e-5 at most, and ours are these numbers.
    np.testing.assert_allclose(ours.reshape(-1, 3, 4, 4), unnormalized(theirs[:, :, 0], processor), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_patches_of_a_square_are_those_of_the_processor(size):
    image, rules, processor = seeing.picture(*size), seeing.gemma_rules(), seeing.gemma_processor().image_processor
    theirs = unnormalized(processor([image], return_tensors="np")["pixel_values"][0], processor)
    ours, where = patches(image, rules).reshape(-1, 3, 4, 4), places((8, 8), rules)
    assert len(ours) == len(where) == 64
    for patch, (row, column) in zip(ours, where):
        here = theirs[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        np.testing.assert_allclose(patch, here, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(640, 480), (500, 1100)], ids=str)
def test_patches_are_those_of_released_models(size):
    image = seeing.picture(*size)
    processor = Gemma3ImageProcessorPil(size={"height": 896, "width": 896})
    theirs = unnormalized(processor([image], return_tensors="np")["pixel_values"][0], processor)
    ours = patches(image, rules_of("gemma3", {}, {})).reshape(16, 16, 4, 4, 3, 14, 14)
    ours = ours.transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, 896, 896)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    processor = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056)
    theirs = processor([image], return_tensors="np")["pixel_values"].reshape(-1, 3, 2, 14, 14)[:, :, 0]
    rules = rules_of("qwen2_5_vl", {}, {"min_pixels": 3136, "max_pixels": 12845056})
    ours = patches(image, rules).reshape(-1, 3, 14, 14)
    np.testing.assert_allclose(ours, unnormalized(theirs, processor), rtol=0, atol=1e-4)


def test_patches_of_a_token_stand_together():
    rules = seeing.gemma_rules()  # 8 x 8 patches, 4 x 4 of which are a token
    blocks = places((8, 8), rules).reshape(4, 16, 2) // 4
    assert blocks[:, 0].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert (blocks == blocks[:, :1]).all()
    assert places((2, 4), seeing.qwen_rules()).tolist() == [
        [0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3],
    ]  # fmt: skip


def test_positions_are_those_that_qwen_gives_them():
    rules, rng = seeing.qwen_rules(), np.random.default_rng(0)
    for _ in range(50):
        grids = [tuple(2 * int(side) for side in rng.integers(1, 6, 2)) for _ in range(rng.integers(0, 4))]
        tokens = rng.integers(0, 50, rng.integers(0, 5)).tolist()
        for rows, columns in grids:
            tokens += [rules.token_id] * (rows * columns // 4) + rng.integers(0, 50, rng.integers(1, 5)).tolist()
        tokens = np.array(tokens or [1])
        theirs = _rope_index(tokens, grids, rules)
        np.testing.assert_array_equal(rope_positions(tokens, grids, rules), theirs)


def _rope_index(tokens, grids, rules):
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    own = partial(Qwen2_5_VLModel.get_vision_position_ids, None)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision), get_vision_position_ids=own)
    ids = torch.tensor(tokens)[None]
    grid = torch.tensor([[1, *grid] for grid in grids]) if grids else None
    positions, _ = Qwen2_5_VLModel.get_rope_index(model, ids, (ids == rules.token_id).int(), grid)
    return positions[:, 0].T.numpy()
