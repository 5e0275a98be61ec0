"""Every family against transformers' torch model of it: float32, small random configs, logits and gradients to 1e-4.

The weights go through files: transformers saves them and our loader reads them, under the names that the family has.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.family_configs import CONFIGS
from support.more_configs import MORE_CONFIGS
from support.tiny import batch_of, documents, one_device
from support.torch_models import torch_model
from support.witness import torch_gradients, torch_logits

from ftjax import tree
from ftjax.models.cache import init_cache
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.params import abstract_params
from ftjax.objectives.sft import make_sft
from ftjax.weights.load import load_params
from ftjax.weights.source import open_source

ROWS, LENGTH = 5, 18  # of every batch here, so that each config is compiled once
INPUTS = ("tokens", "positions", "segment_ids")
FIXED = ("act_fn/beta", "act_fn/eps", "mlp/correction", "/layer_scalar")  # parameters that are not trained


def read(path):
    reader = open_source(path)
    decoder = Decoder(spec_from_config(reader.config))
    return decoder, load_params(reader, decoder.spec, abstract_params(decoder, one_device()))


class Case:
    """One config: `torch`, its model in transformers; `decoder` and `params`, ours; `run` of a batch."""

    def __init__(self, config, path):
        self.path, self.torch = path, torch_model(config)
        self.torch.save_pretrained(path / "model")
        self.decoder, self.params = read(path / "model")
        objective = make_sft(self.decoder)

        @jax.jit
        def run(params, batch):
            hidden, _ = self.decoder.apply({"params": params}, *(batch[name] for name in INPUTS))
            logits = self.decoder.apply({"params": params}, hidden, method=self.decoder.unembed)
            gradients = jax.grad(lambda params: objective({"params": params}, batch, jax.random.key(0)).sum)(params)
            return logits, gradients

        self.run = lambda batch: jax.device_get(run(self.params, batch))

    def torch_gradients(self, docs):
        """Torch's gradients of the summed loss as a tree of ours: they travel as if they were weights.

        In float64, so that only our own rounding counts: for experts by a loop over them, as torch's grouped products
        are there for float32 alone. (What they are chosen by stays in float32.)
        """
        carrier, model = copy.deepcopy(self.torch), copy.deepcopy(self.torch)
        if any("experts" in name for name, _ in model.named_parameters()):
            model.set_experts_implementation("eager")
        gradients = torch_gradients(model.double(), docs)
        with torch.no_grad():
            for name, parameter in carrier.named_parameters():
                parameter.copy_(gradients[name])
            for buffer in carrier.buffers():  # of which files have some, and which have no gradient
                buffer.zero_()
        carrier.save_pretrained(self.path / "gradients")
        return read(self.path / "gradients")[1]


def configs(quick):
    """Every config as a parameter; all but the `quick` ones are slow."""
    every = (CONFIGS | MORE_CONFIGS).items()
    return [pytest.param(value, id=name, marks=() if name in quick else pytest.mark.slow) for name, value in every]


# Families all of whose parts are in others that are quick.
SLOW = {"arcee", "ernie4_5", "exaone4", "glm", "helium", "ministral", "olmo3", "seed_oss", "starcoder2", "qwen3_5_moe"}
SLOW |= {"granitemoehybrid"}


@pytest.fixture(
    scope="module", params=configs(quick=[name for name in CONFIGS if "," not in name and name not in SLOW])
)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("case"))


def lay_out(rows, left=False):
    return batch_of(rows + [[]] * (ROWS - len(rows)), LENGTH, left)


def check_gradients(gradients, case, docs, record_figure):
    ours, theirs = tree.flatten(gradients), tree.flatten(case.torch_gradients(docs))
    experts = case.decoder.spec.experts
    alone = experts and experts.per_token == 1 and experts.normalize  # its weight is 1 whatever the router says
    for path, leaf in theirs.items():
        if path.endswith(FIXED):
            assert not leaf.any()
            continue
        assert (np.abs(leaf).max() > 1e-3) != bool("/router/" in path and alone), f"{path}: too small"
    record_figure("gradients", max(np.abs(ours[path] - theirs[path]).max() for path in theirs))
    for path in theirs:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=0, atol=1e-4, err_msg=path)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padded_rows_are_each_document_alone(case, left, record_figure):
    docs = documents(2, [18, 11, 4, 7])
    batch = lay_out([[doc] for doc in docs], left)
    logits, gradients = case.run(batch)
    assert np.isfinite(logits).all()
    theirs = np.concatenate([torch_logits(case.torch, tokens) for tokens, _ in docs])
    assert 0.5 < theirs.std() < 2, "of another size, an absolute tolerance would mean something else"
    ours = np.concatenate([logits[row][batch["segment_ids"][row] > 0] for row in range(4)])
    record_figure("logits", np.abs(ours - theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    if not left:
        check_gradients(gradients, case, docs, record_figure)


def test_packed_documents_are_each_document_alone(case, record_figure):
    docs = documents(3, [6, 12, 5, 3, 9])
    batch = lay_out([docs[:2], docs[2:]])
    packed, gradients = case.run(batch)
    places = [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]
    ours = np.concatenate([packed[row][batch["segment_ids"][row] == segment] for row, segment in places])
    theirs = np.concatenate([torch_logits(case.torch, tokens) for tokens, _ in docs])
    record_figure("logits", np.abs(ours - theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    check_gradients(gradients, case, docs, record_figure)


def test_the_comparison_of_packed_documents_can_fail(case):
    """The same row as one segment with positions that run on gives the second document other logits."""
    batch = lay_out([documents(3, [6, 9])])
    separate, _ = case.run(batch)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    leaking, _ = case.run(batch | {"segment_ids": np.minimum(batch["segment_ids"], 1), "positions": positions})
    assert np.abs(leaking[0, 6:15] - separate[0, 6:15]).max() > 0.1


def test_cached_decoding_equals_the_full_forward(case, record_figure):
    """Prompts of other lengths in one part, then one token at a time."""
    prompts, new = [7, 3, 5], 5
    docs = documents(4, [length + new for length in prompts])
    full, _ = case.run(lay_out([[doc] for doc in docs]))

    @jax.jit
    def forward(cache, tokens, positions, segment_ids):
        variables = {"params": case.params}
        hidden, cache = case.decoder.apply(variables, tokens, positions, segment_ids, cache)
        return case.decoder.apply(variables, hidden, method=case.decoder.unembed), cache

    batch = batch_of([[(doc[0][:n], doc[1][:n])] for doc, n in zip(docs, prompts)], 7)
    batch["positions"] = np.broadcast_to(np.arange(7, dtype=np.int32), (3, 7))
    # Four slots more than are ever written.
    cache = init_cache(case.decoder.spec, 3, 16, jnp.float32, reach=jnp.asarray(prompts) + new)
    logits, cache = forward(cache, *(batch[name] for name in INPUTS))
    differences = [np.abs(logits[row, :n] - full[row, :n]).max() for row, n in enumerate(prompts)]
    for step in range(new):
        places = np.array(prompts, np.int32) + step
        tokens = np.array([doc[0][place] for doc, place in zip(docs, places)], np.int32)
        logits, cache = forward(cache, tokens[:, None], places[:, None], np.ones((3, 1), np.int32))
        differences += [np.abs(logits[row, 0] - full[row, place]).max() for row, place in enumerate(places)]
    record_figure("logits", max(differences))
    assert max(differences) < 1e-5


@pytest.mark.parametrize("case", configs(quick=("llama", "gemma2", "gpt2", "gpt_oss", "mixtral")), indirect=True)
def test_bfloat16_stays_close(case, record_figure):
    """Activations in bfloat16 move most logits of order 1 by less than a tenth (some tokens change their expert)."""
    batch = lay_out([documents(6, [12])])
    decoder = case.decoder.clone(dtype=jnp.bfloat16)
    variables = {"params": case.params}
    hidden, _ = jax.jit(decoder.apply)(variables, *(batch[name] for name in INPUTS))
    assert hidden.dtype == jnp.bfloat16
    half = decoder.apply(variables, hidden, method=decoder.unembed)
    assert half.dtype == np.float32
    full, _ = case.run(batch)
    difference = np.abs(half[0, :12] - full[0, :12])
    record_figure("median logit difference", np.median(difference))
    assert 1e-4 < np.median(difference) < 0.1
