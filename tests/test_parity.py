"""The figures of a parity report against torch in float64, and which exports are told apart by them."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from support.chat_templates import CHATML, make_tokenizer
from support.tiny import batch_of, logits, numpy_params, one_device, spec

from ftjax import parity, tree
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder


def random_logits(seed, sizes=(5, 3), scale=3.0):
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((n, 40)) * scale).astype(np.float32) for n in sizes]


def test_the_figures_are_those_of_torch():
    expected = random_logits(0)
    found = [a + b for a, b in zip(expected, random_logits(1, scale=1.0))]
    got = parity.differences(expected, found)
    p, q = (torch.tensor(np.concatenate(part), dtype=torch.float64) for part in (expected, found))
    kl = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    centerd = [part - part.mean(-1, keepdim=True) for part in (p, q)]
    wanted = {
        "max_abs_logit_difference": (q - p).abs().max(),
        "mean_abs_logit_difference": (q - p).abs().mean(),
        "max_kl": kl.max(),
        "mean_kl": kl.mean(),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double().mean(),
        "relative_difference": (centerd[1] - centerd[0]).norm() / centerd[0].norm(),
    }
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name] == pytest.approx(value.item(), rel=1e-6), name
    assert 0 < got["top1_agreement"] < 1


def test_a_shift_of_all_logits_is_none_and_equal_ones_are_zero():
    expected = random_logits(0)
    same = parity.differences(expected, expected)
    assert same == dict.fromkeys(same, 0.0) | {"top1_agreement": 1.0}
    shifted = parity.differences(expected, [part + 2 for part in expected])
    assert shifted["max_abs_logit_difference"] == pytest.approx(2, rel=1e-6)
    assert shifted["relative_difference"] < 1e-6
    assert shifted["mean_kl"] < 1e-6


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_logit_that_is_no_number_fails_every_export(value):
    broken = random_logits(0)
    broken[1][2, 7] = value
    with np.errstate(invalid="ignore"):
        found = parity.differences(random_logits(0), broken)
    with pytest.raises(UserError, match="the export does not say what the run says"):
        parity.check(found, "bfloat16")


@pytest.fixture(scope="module")
def model():
    """(decoder in bfloat16, prompts, parameters, a function of parameters: their logits)"""
    decoder = Decoder(spec(vocab_size=400, max_position_embeddings=512), dtype=jnp.bfloat16)
    tokenizer = make_tokenizer(CHATML)
    prompts = parity.prompts(tokenizer, Path("no/such/file"), 512)
    params = numpy_params(decoder)
    return decoder, prompts, params, lambda params: parity.logits(decoder, {"params": params}, prompts, one_device())


def test_logits_are_computed_in_float32(model, record_figure):
    decoder, prompts, params, run = model
    found = run(params)
    for prompt, ours in zip(prompts, found, strict=True):
        batch = batch_of([[(prompt.tokens, np.ones(len(prompt.tokens), bool))]], found_length(prompts))
        theirs = logits(decoder.clone(dtype=jnp.float32), {"params": params}, batch)[0, : len(prompt.tokens)]
        assert ours.shape == (len(prompt.tokens), 400)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def found_length(prompts):
    return max(len(prompt.tokens) for prompt in prompts)


def rounded(params, kind):
    if kind != "q8_0":
        return tree.unflatten({path: leaf.astype(jnp.dtype(kind)) for path, leaf in tree.flatten(params).items()})
    out = {}
    for path, leaf in tree.flatten(params).items():
        kernel = path.endswith("/kernel")
        rows = np.ascontiguousarray(leaf.swapaxes(-1, -2)) if kernel else leaf
        if rows.ndim > 1 and rows.shape[-1] % 32 == 0 and not path.endswith("scale"):
            rows = dequantize(quantize(rows, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
        out[path] = rows.swapaxes(-1, -2) if kernel else rows
    return tree.unflatten(out)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "q8_0"])
def test_rounding_stays_within_the_limit_of_its_type(model, kind, record_figure):
    _, _, params, run = model
    found = parity.differences(run(params), run(rounded(params, kind)))
    record_figure("relative difference", found["relative_difference"])
    assert found["relative_difference"] > 1e-5
    parity.check(found, kind)


def swapped(leaf):
    return leaf[::-1]


def transposed(leaf):
    return leaf.swapaxes(-1, -2)


def zero_in_one_layer(leaf):
    return np.concatenate([leaf[:1], 0 * leaf[1:]])


@pytest.mark.parametrize(
    ("path", "mistake"),
    [
        ("layers/self_attn/o_proj/kernel", transposed),
        ("layers/mlp/down_proj/kernel", swapped),
        ("layers/self_attn/v_proj/kernel", zero_in_one_layer),
        ("embed_tokens/embedding", swapped),
    ],
)
def test_a_wrong_tensor_is_beyond_the_limit_of_every_type(model, path, mistake, record_figure):
    _, _, params, run = model
    leaves = tree.flatten(params)
    found = parity.differences(run(params), run(tree.unflatten(leaves | {path: mistake(leaves[path])})))
    record_figure("relative difference", found["relative_difference"])
    for kind in set(parity.LIMITS) - {"q8_0"}:
        with pytest.raises(UserError, match=f"where {kind} explains"):
            parity.check(found, kind)


def test_prompts_are_chats_and_what_the_run_completed(tmp_path):
    tokenizer = make_tokenizer(CHATML)
    samples = tmp_path / "samples.jsonl"
    records = [{"step": 2, "prompt": f"The lamp {i}", "completion": "send " * i, "score": 1.0} for i in range(5)]
    plain = parity.prompts(tokenizer, samples, 512)
    samples.write_text("".join(json.dumps(record) + "\n" for record in records))
    prompts = parity.prompts(tokenizer, samples, 512)
    assert [prompt.text for prompt in prompts[: len(plain)]] == list(parity.TEXTS)
    assert len(prompts) == len(plain) + parity.MAX_SAMPLES
    text = tokenizer.decode(prompts[-1].tokens)
    assert text.endswith("user\nThe lamp 2<|im_end|>\n<|im_start|>assistant\nsend send ")
    assert max(len(prompt.tokens) for prompt in parity.prompts(tokenizer, samples, 7)) == 7
    assert parity.prompts(make_tokenizer(None), samples, 512)[0].tokens.dtype == np.int32
