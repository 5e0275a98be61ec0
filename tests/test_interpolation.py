"""On the line between a base and what was trained from it, whatever was trained: against float64 NumPy."""

import numpy as np
import pytest
from support.adapted import assembled, moved
from support.peft_witness import base_in_torch
from support.runs import command, finish
from support.tiny import one_device

from ftjax import interpolation, quant, tree
from ftjax.errors import UserError
from ftjax.models.params import abstract_params
from ftjax.weights.load import load_params
from ftjax.weights.source import open_source

COMMON = {"adapter.rank": 4, "adapter.alpha": 12.0}
KINDS = {
    "lora and a module": {"adapter.targets": "q_proj,v_proj", "adapter.modules_to_save": ("lm_head", "norm")},
    "embedding": {"adapter.targets": "embed_tokens,q_proj"},
    "dora": {"adapter.kind": "dora"},
    "pissa": {"adapter.init": "pissa"},
    "dora beside int8": {"adapter.kind": "dora", "adapter.layers": "1", "quantize.base": "int8"},
    "full": {"adapter.kind": "none", "adapter.rank": 16, "adapter.alpha": 32.0},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    base_in_torch(tie_word_embeddings=False).save_pretrained(path)
    return path


SLOW = ("embedding", "dora")  # which others have, too


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in KINDS])
def test_every_weight_is_on_the_line(directory, name):
    run = moved(assembled(directory, **COMMON | KINDS[name]))
    reader = open_source(directory)
    published = load_params(reader, run.model.spec, abstract_params(run.model, one_device()))
    wanted = interpolation.changed(tree.flatten(run.variables), run.is_trained)
    base = {path: leaf for path, leaf in tree.flatten(published).items() if path in wanted}
    found = interpolation.interpolated(run.variables, base, quant.kernel, 0.3)

    if "quant" in run.variables:  # the base is the one that the adapter was trained beside
        published = quant.whole_params(run.variables, np.float32)
    start, tuned, between = (
        {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(params).items()}
        for params in (published, weights(run.variables), weights(found))
    )
    moves = 0
    for path, value in between.items():
        expected = start[path] + 0.3 * (tuned[path] - start[path])
        np.testing.assert_allclose(value, expected, rtol=0, atol=3e-6, err_msg=path)
        moves += np.abs(tuned[path] - start[path]).max() > 0.01
    assert moves >= 2
    of_pissa = ("lora_a0", "lora_b0")
    assert set(tree.flatten(found)) == {path for path in tree.flatten(run.variables) if not path.endswith(of_pissa)}


def weights(variables):
    """The parameters of the model with its adapters in them, in float64."""
    params = quant.whole_params(variables, np.float32)
    leaves = {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(params).items()}
    for module, parts in tree.by_module(variables.get("lora", {})).items():
        its = {part: np.asarray(leaf, np.float64) for part, leaf in parts.items()}
        path = next(path for path in (f"{module}/kernel", f"{module}/embedding") if path in leaves)
        scale = its["lora_scale"][..., None, None]
        whole = leaves[path] + scale * its["lora_a"] @ its["lora_b"]
        if "lora_magnitude" in its:
            norms = np.linalg.norm(whole, axis=-2, keepdims=True)
            whole = np.where(scale == 0, leaves[path], whole / norms * its["lora_magnitude"][..., None, :])
        leaves[path] = whole
    return tree.unflatten(leaves)


def test_the_share_is_above_0_and_at_most_1():
    assert interpolation.check(1.0) == 1
    for share in (0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(UserError, match=f"--interpolate={share:g}: it must be above 0"):
            interpolation.check(share)


def test_generate_refuses_it_without_a_run():
    said = finish(command("ftjax.generate", "--model=m", "--prompt=p", "--interpolate=0.5"), status=2)
    assert "--interpolate goes with --workdir" in said
