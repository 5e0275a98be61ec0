"""Vision-language models against transformers' torch models of them: float32, small random configs, images in rows.

Logits and gradients to 1e-4, the tower's among them. The weights go through files that transformers writes.
"""

import copy
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import CONFIG as TINY
from support.tiny import logits, one_device
from support.vision import CONFIGS, IMAGE, torch_logits
from support.vision_case import INPUTS, LENGTH, Case, random_adapters
from transformers import Gemma3ImageProcessor, Qwen2VLImageProcessor

from ftjax import tree
from ftjax.data.images.rules import rules_of
from ftjax.errors import UserError
from ftjax.models.cache import init_cache
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.kernels import choose
from ftjax.models.params import abstract_params, shapes
from ftjax.models.published import configs
from ftjax.models.vision import Images, images_of
from ftjax.objectives.sft import make_sft
from ftjax.weights.load import load_params
from ftjax.weights.source import open_source


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("case"))


def check_gradients(gradients, case, docs, record_figure):
    ours, theirs = tree.flatten(gradients), tree.flatten(case.torch_gradients(docs))
    for path, leaf in theirs.items():
        if not path.endswith("k_proj/bias"):  # which moves all scores of a query alike
            assert np.abs(leaf).max() > 1e-3, f"{path}: too small"
    record_figure("gradients", max(np.abs(ours[path] - theirs[path]).max() for path in theirs))
    for path in theirs:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=0, atol=1e-4, err_msg=path)


def test_rows_with_images_are_each_document_alone(case, record_figure):
    """One row with two images, one with an image that lies across the parts of attention, one of text."""
    docs = [case.doc([5, 3, 9], 0), case.doc([43, 20], 2), case.doc([30], 3)]
    batch = case.batch([[doc] for doc in docs])
    logits, gradients = case.run(batch)
    assert np.isfinite(logits).all()
    theirs = np.concatenate([torch_logits(case.torch, case.vision, doc) for doc in docs])
    assert 0.5 < theirs.std() < 2, "of another size, an absolute tolerance would mean something else"
    ours = np.concatenate([logits[row][batch["segment_ids"][row] > 0] for row in range(3)])
    record_figure("logits", np.abs(ours - theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    check_gradients(gradients, case, docs, record_figure)


def test_packed_documents_with_images_are_each_document_alone(case, record_figure):
    docs = [case.doc([4, 6], 1), case.doc([11], 4), case.doc([0, 5, 4], 5), case.doc([9], 6), case.doc([7, 8], 7)]
    batch = case.batch([docs[:3], docs[3:]])
    packed, gradients = case.run(batch)
    places = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]
    ours = np.concatenate([packed[row][batch["segment_ids"][row] == segment] for row, segment in places])
    theirs = np.concatenate([torch_logits(case.torch, case.vision, doc) for doc in docs])
    record_figure("logits", np.abs(ours - theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    check_gradients(gradients, case, docs, record_figure)


def test_the_comparison_can_fail(case):
    """The order of images, and where their patches lie, changes what follows them."""
    doc = case.doc([5, 3, 9], 5)
    batch = case.batch([[doc]])
    right, _ = case.run(batch)
    mixed = batch | {"patches": batch["patches"][:, ::-1].copy()}
    turned = batch | {"patch_places": batch["patch_places"][..., ::-1].copy()}
    for wrong in (mixed, turned):
        other, _ = case.run(wrong)
        after = np.flatnonzero(doc.tokens == IMAGE).max()
        assert np.abs(other[0, after + 1 : len(doc.tokens)] - right[0, after + 1 : len(doc.tokens)]).max() > 0.05


def test_decoding_goes_on_after_a_prompt_with_images(case, record_figure):
    """By a cache, and with M-RoPE by positions that images have moved; the prompt in one part."""
    doc, new = case.doc([5, 3, 9], 1), 3
    theirs, length = torch_logits(case.torch, case.vision, doc), len(doc.tokens) - new
    batch = {name: array[:1] for name, array in case.batch([[doc]]).items()}
    tokens, positions, segment_ids = (batch[name][:, :length] for name in INPUTS)
    images = images_of(batch)
    if images.rope_positions is not None:
        images = images._replace(rope_positions=images.rope_positions[:, :length])
    cache = init_cache(case.decoder.spec, 1, LENGTH, jnp.float32)

    @jax.jit
    def forward(cache, tokens, positions, segment_ids, images):
        hidden, cache = case.decoder.apply({"params": case.params}, tokens, positions, segment_ids, cache, images)
        return case.decoder.apply({"params": case.params}, hidden, method=case.decoder.unembed)[0], cache

    logits, cache = forward(cache, tokens, positions, segment_ids, images)
    differences = [np.abs(logits - theirs[:length]).max()]
    reach = np.array([LENGTH], np.int32)
    hidden, (keys, _, _) = case.decoder.apply(
        {"params": case.params}, tokens, positions, segment_ids, reach, images, method="prefill"
    )
    again = case.decoder.apply({"params": case.params}, hidden, method=case.decoder.unembed)[0]
    differences += [np.abs(again - logits).max(), np.abs(keys - cache.keys[:, :, :, :length]).max()]
    for place in range(length, len(doc.tokens)):
        at = np.array([[place]], np.int32)
        images = None
        if case.decoder.spec.mrope:
            moved = batch["rope_positions"][:, length - 1, :1] - (length - 1)  # the same for all that follows
            images = Images(None, None, None, np.repeat(at[..., None] + moved, 3, axis=-1))
        logits, cache = forward(cache, doc.tokens[None, place : place + 1], at, np.ones_like(at), images)
        differences.append(np.abs(logits[0] - theirs[place]).max())
    record_figure("logits", max(differences))
    assert max(differences) < 1e-4


def test_remade_activations_change_nothing(case):
    doc = case.doc([5, 3, 9], 2)
    batch = case.batch([[doc]])
    _, expected = case.run(batch)
    objective = make_sft(case.decoder.clone(remat="full"))
    found = jax.jit(jax.grad(lambda params: objective({"params": params}, batch, jax.random.key(0)).sum))(case.params)
    for path, leaf in tree.flatten(jax.device_get(found)).items():
        np.testing.assert_allclose(leaf, tree.flatten(expected)[path], rtol=0, atol=1e-5, err_msg=path)


def test_text_alone_is_read_as_by_the_language_model(case):
    """With the tower or without it, and without arrays of images in the batch."""
    batch = case.batch([[case.doc([20], 1)], [case.doc([8], 2), case.doc([6], 3)]])
    with_arrays, _ = case.run(batch)
    text = {name: batch[name] for name in INPUTS}
    reader = open_source(case.path / "model")
    alone = Decoder(spec_from_config(reader.config))
    assert alone.spec.vision is None
    assert not any(path.startswith("vision") for path in shapes(alone))
    params = load_params(reader, alone.spec, abstract_params(alone, one_device()))
    for decoder, its in ((case.decoder, case.params), (alone, params)):
        found = logits(decoder, {"params": its}, text)
        np.testing.assert_allclose(found, with_arrays, rtol=0, atol=1e-5)


def test_a_model_without_a_tower_here_is_refused():
    with pytest.raises(UserError, match=r"'llama'.*only of gemma3, qwen2_5_vl"):
        spec_from_config(TINY, vision=True)


def test_kernels_without_two_ways_are_refused(case):
    model = case.decoder.clone(attention="cudnn")
    chosen = functools.partial(choose, "cudnn", model.spec, jnp.bfloat16, 64, one_device())
    if not case.vision.two_way:
        assert chosen().name == "xla"  # on the devices of tests
        return
    with pytest.raises(UserError, match=r"attention='cudnn'.*both ways in a gemma3 model"):
        chosen()


@pytest.mark.parametrize(("name", "count"), [("gemma-3-4b", 4_300_079_472), ("Qwen2.5-VL-7B", 8_292_166_656)])
def test_released_models_have_the_parameters_that_their_owners_count(name, count):
    """As their pages say; and as configs are published, with the text's fields in one object or at the top."""
    spec = spec_from_config(configs()[name], vision=True)
    assert sum(map(math.prod, shapes(Decoder(spec)).values())) == count
    assert spec.vision.merge * spec.vision.patch == {"gemma-3-4b": 56, "Qwen2.5-VL-7B": 28}[name]


@pytest.mark.parametrize(
    ("model", "part", "changes", "message"),
    [
        ("gemma3", "vision_config", {"vision_use_head": True}, "vision_use_head=True"),
        ("gemma3", "vision_config", {"num_channels": 4}, "num_channels=4"),
        ("gemma3", "vision_config", {"num_attention_heads": 5}, "not a multiple of its 5 heads"),
        ("gemma3", None, {"mm_tokens_per_image": 8}, "mm_tokens_per_image=8"),
        ("gemma3", None, {"image_token_index": "x"}, "image_token_index='x' is not the id"),
        ("gemma3", None, {"vision_config": None}, "lacks 'vision_config'"),
        ("qwen2_5_vl", "vision_config", {"window_size": 2}, "window_size=2"),
        ("qwen2_5_vl", "vision_config", {"fullatt_block_indexes": 3}, "fullatt_block_indexes=3"),
        ("qwen2_5_vl", "vision_config", {"in_chans": 1}, "in_chans=1"),
        ("qwen2_5_vl", "vision_config", {"num_heads": 4}, "no multiple of 4"),
        ("qwen2_5_vl", "text_config", {"rope_parameters": {"mrope_section": [1, 2]}}, "three numbers"),
        ("qwen2_5_vl", "text_config", {"rope_parameters": {"mrope_section": [1, 2, 2]}}, "heads of 8"),
    ],
)
def test_towers_that_are_not_ported_are_refused_by_name(model, part, changes, message):
    config = copy.deepcopy(CONFIGS[model])
    (config if part is None else config[part]).update(changes)
    with pytest.raises(UserError, match=re.escape(message)):
        spec_from_config(config, vision=True)


def test_bfloat16_stays_close(case, record_figure):
    doc = case.doc([5, 3, 9], 0)
    batch = case.batch([[doc]])
    decoder = case.decoder.clone(dtype=jnp.bfloat16)
    given = (batch[name] for name in INPUTS)
    hidden, _ = jax.jit(decoder.apply)({"params": case.params}, *given, images=images_of(batch))
    assert hidden.dtype == jnp.bfloat16
    half = decoder.apply({"params": case.params}, hidden, method=decoder.unembed)
    difference = np.abs(half[0, : len(doc.tokens)] - case.logits(batch)[0, : len(doc.tokens)])
    record_figure("median logit difference", np.median(difference))
    assert 1e-4 < np.median(difference) < 0.1


def test_adapters_of_the_tower_drop_out_what_they_read(case):
    """And where the rate is 0 they do not; dropout is there where there is an rng, as in the language model."""
    batch = case.batch([[case.doc([5, 9], 0)]])
    adapters = random_adapters(case.params, "vision/layers/.*down_proj", 3, 1.0)
    leaves = tree.flatten(adapters)
    rates = {path.replace("lora_scale", "lora_dropout"): leaf for path, leaf in leaves.items() if "scale" in path}
    found = []
    for rate in (0.5, 0.0):
        its = tree.unflatten(leaves | {path: np.full_like(leaf, rate) for path, leaf in rates.items()})
        variables, given = {"params": case.params, "lora": its}, [batch[name] for name in INPUTS]
        options = {"images": images_of(batch), "rngs": {"dropout": jax.random.key(0)}}
        found.append(case.decoder.apply(variables, *given, **options)[0])
    plain = case.decoder.apply({"params": case.params, "lora": adapters}, *given, images=images_of(batch))[0]
    np.testing.assert_allclose(found[1], plain, rtol=0, atol=1e-5)
    assert np.abs(found[0] - plain).max() > 0.01


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_what_processors_of_transformers_do_by_default_is_what_the_tower_is_given(name):
    made = {"gemma3": Gemma3ImageProcessor, "qwen2_5_vl": Qwen2VLImageProcessor}[name]
    settings = json.loads(made().to_json_string()) | (
        {"size": {"height": 896, "width": 896}} if name == "gemma3" else {}
    )
    released = configs()["gemma-3-4b" if name == "gemma3" else "Qwen2.5-VL-7B"]
    vision, rules = spec_from_config(released, vision=True).vision, rules_of(name, released, settings)
    np.testing.assert_allclose(vision.mean, settings["image_mean"])
    np.testing.assert_allclose(vision.std, settings["image_std"])
    assert (vision.patch, vision.merge, vision.image_token) == (rules.patch, rules.merge, rules.token_id)
    assert vision.tokens in (None, rules.tokens(640, 480))
