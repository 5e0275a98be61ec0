"""A parity report of a model that reads images has a prompt with one, and notices what the tower has lost."""

import copy

import numpy as np
import pytest
from support.chat_templates import CHATML, make_tokenizer
from support.tiny import one_device
from support.vision import CONFIGS, Pictured, torch_logits
from support.vision_case import Case

from ftjax import parity, tree

IMAGE = 500  # which is no token of the tokenizer


@pytest.fixture(scope="module", params=CONFIGS)
def case(request, tmp_path_factory):
    config = copy.deepcopy(CONFIGS[request.param])
    config["text_config"]["vocab_size"] = 512
    config |= {name: IMAGE for name in ("image_token_index", "image_token_id") if name in config}
    return Case(config, tmp_path_factory.mktemp("case"))


def image_of(patches, places, patch):
    """uint8 [3, height, width]"""
    rows, columns = places.max(axis=0) + 1
    out = np.zeros((3, rows * patch, columns * patch), np.uint8)
    for values, (row, column) in zip(patches, places, strict=True):
        part = slice(row * patch, (row + 1) * patch), slice(column * patch, (column + 1) * patch)
        out[:, *part] = values.reshape(3, patch, patch)
    return out


def test_the_last_prompt_begins_with_an_image_and_says_what_torch_says(case, tmp_path, record_figure):
    texts = parity.prompts(make_tokenizer(CHATML, "<|im_end|>"), tmp_path / "samples.jsonl", 96, case.decoder.spec)
    assert [prompt.images is not None for prompt in texts] == [False] * len(parity.TEXTS) + [True]
    last = texts[-1]
    assert last.tokens[0] == IMAGE
    assert last.text == f"(an image) {parity.TEXTS[0]}"
    image = image_of(last.images.patches[0], last.images.places[0], case.vision.patch)
    ours = parity.logits(case.decoder, {"params": case.params}, texts, one_device())
    assert [len(row) for row in ours] == [len(prompt.tokens) for prompt in texts]
    theirs = torch_logits(case.torch, case.vision, Pictured(last.tokens, last.tokens < 0, [image]))
    record_figure("logits", np.abs(ours[-1] - theirs).max())
    np.testing.assert_allclose(ours[-1], theirs, rtol=0, atol=1e-4)


def test_a_kernel_that_the_tower_has_lost_is_noticed(case, tmp_path):
    texts = parity.prompts(make_tokenizer(CHATML, "<|im_end|>"), tmp_path / "samples.jsonl", 96, case.decoder.spec)
    expected = parity.logits(case.decoder, {"params": case.params}, texts, one_device())
    leaves = tree.flatten(case.params)
    leaves["vision/layers/mlp/down_proj/kernel"] *= 0
    found = parity.logits(case.decoder, {"params": tree.unflatten(leaves)}, texts, one_device())
    assert parity.differences(expected[:-1], found[:-1])["relative_difference"] < 1e-6
    with pytest.raises(parity.UserError, match="does not say what the run says"):
        parity.check(parity.differences(expected, found), "float32")
