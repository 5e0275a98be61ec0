"""How many patches and tokens an image has, as transformers' processors have it; what is refused."""

import json

import numpy as np
import pytest
from support import seeing
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from ftjax.data.images.rules import ImageRules, rules_of
from ftjax.errors import UserError

SIZES = [(1, 1), (1, 150), (50, 30), (31, 90), (640, 480), (481, 641), (1920, 1080), (4000, 30), (28, 28), (5000, 5000)]
RELEASED_QWEN = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
RELEASED_GEMMA = {
    "do_pan_and_scan": None,
    "image_seq_length": 256,
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 896, "width": 896},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("most", [0, 200_000])
def test_an_image_on_a_grid_is_resized_as_the_processor_resizes_it(size, most):
    rules = rules_of("qwen2_5_vl", {}, RELEASED_QWEN, most)
    width, height = size
    resized = smart_resize(height, width, 28, 3136, most or 12845056)
    assert rules.grid(width, height) == (resized[0] // 14, resized[1] // 14)
    assert rules.tokens(width, height) == resized[0] * resized[1] // 28**2
    assert rules.mrope


def test_every_image_of_a_square_has_the_same_tokens():
    rules = rules_of("gemma3", {"image_token_index": 262_144}, RELEASED_GEMMA)
    assert (rules.patch, rules.merge, rules.size, rules.mrope) == (14, 4, 896, False)
    assert [rules.tokens(*size) for size in SIZES] == [256] * len(SIZES)
    assert rules.expanded(2) == "\n\n<start_of_image><image_soft_token><image_soft_token><end_of_image>\n\n"


def test_rules_are_read_from_the_processor_that_transformers_saves(tmp_path):
    for model_type, family in seeing.FAMILIES.items():
        family.processor().image_processor.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
        config = seeing.gemma_config() if model_type == "gemma3" else seeing.qwen_config()
        assert rules_of(model_type, config, saved) == family.rules()
        assert rules_of(model_type, config, {"image_processor": saved}) == family.rules()


def test_rules_are_json():
    rules = seeing.qwen_rules()
    assert ImageRules(*json.loads(json.dumps(rules))) == rules


def test_rows_of_batches_have_room_for_a_power_of_two_of_images():
    square = seeing.gemma_rules()  # 64 patches and 4 tokens an image
    assert [square.room(4 * images) for images in (0, 1, 2, 3, 4, 5)] == [64, 64, 128, 256, 256, 512]
    grid = seeing.qwen_rules()
    assert [grid.room(tokens) for tokens in (0, 1, 64, 65, 128, 129)] == [256, 256, 256, 512, 512, 1024]


@pytest.mark.parametrize(
    ("model_type", "preprocessor", "most", "message"),
    [
        ("llama", {}, 0, "model_type 'llama' are not supported; of gemma3, qwen2_5_vl"),
        ("gemma3", {"do_pan_and_scan": True}, 0, "do_pan_and_scan is True.*set it to false"),
        ("gemma3", {"size": {"height": 224, "width": 224}}, 0, "size is .*896 x 896"),
        ("gemma3", {"image_mean": [0.4] * 3}, 0, "image_mean is"),
        ("gemma3", {"image_seq_length": 64}, 0, "image_seq_length is 64"),
        ("gemma3", {}, 1000, "resizes every image to one size"),
        ("gemma3", {"resample": 1}, 0, "resample is 1"),
        ("qwen2_5_vl", {"do_resize": False}, 0, "do_resize is False"),
        ("qwen2_5_vl", {"rescale_factor": 1.0}, 0, "rescale_factor is 1.0"),
        ("qwen2_5_vl", {"patch_size": 16}, 0, "patch_size is 16.*vision_config, 14"),
        ("qwen2_5_vl", {"temporal_patch_size": 1}, 0, "temporal_patch_size is 1"),
        ("qwen2_5_vl", RELEASED_QWEN, 1000, "may have 1000 pixels at most.*3136"),
        ("qwen2_5_vl", RELEASED_QWEN, -1, "are -1; write a positive"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(model_type, preprocessor, most, message):
    with pytest.raises(UserError, match=message):
        rules_of(model_type, {}, preprocessor, most)


def test_an_image_that_is_too_narrow_has_no_grid():
    with pytest.raises(ValueError, match="201 x 1 pixels, one side over 200 times"):
        seeing.qwen_rules().grid(201, 1)
    assert np.prod(seeing.gemma_rules().grid(201, 1)) == 64
