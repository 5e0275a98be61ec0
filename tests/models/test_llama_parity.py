"""Our decoder against transformers' torch Llama: float32, random small configs, logits and every gradient to 1e-4."""

import jax
import numpy as np
import pytest
import torch
from tiny import batch_of, documents, numpy_params, spec
from witness import from_torch, torch_gradients, torch_llama, torch_logits

from ftjax import tree
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.objectives.sft import make_sft

SPECS = {
    "tied": spec(),
    "untied, head_dim not hidden/heads": spec(tie_word_embeddings=False, hidden_size=24, head_dim=10),
    "odd heads, other theta": spec(hidden_size=36, num_attention_heads=9, num_key_value_heads=3, rope_theta=100.0),
    "untied, one kv head, other eps": spec(tie_word_embeddings=False, num_key_value_heads=1, rms_norm_eps=0.1),
    "as many kv heads, three layers": spec(num_key_value_heads=4, num_hidden_layers=3),
}
ROWS, LENGTH = 5, 18  # of every batch here, so that each config is compiled once


@pytest.fixture(scope="module", params=SPECS.values(), ids=SPECS.keys())
def pair(request):
    """(spec, run, params, the same model in torch); run(batch) -> (logits, {path: gradient of the summed loss})"""
    model = Decoder(request.param)
    params = numpy_params(model)
    objective = make_sft(model)

    @jax.jit
    def run(params, batch):
        hidden, _ = model.apply({"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"])
        gradients = jax.grad(lambda params: objective({"params": params}, batch, jax.random.key(0)).sum)(params)
        return model.apply({"params": params}, hidden, method=model.unembed), tree.flatten(gradients)

    return request.param, lambda batch: jax.device_get(run(params, batch)), params, torch_llama(request.param, params)


def lay_out(rows, left=False):
    return batch_of(rows + [[]] * (ROWS - len(rows)), LENGTH, left)


def check_gradients(gradients, pair, docs, record_figure):
    _, _, params, witness = pair
    theirs = from_torch(torch_gradients(witness, docs), params)
    assert gradients.keys() == theirs.keys()
    assert all(np.abs(leaf).max() > 1e-2 for leaf in theirs.values()), "too small for an absolute tolerance"
    record_figure("gradients", max(np.abs(gradients[path] - theirs[path]).max() for path in theirs))
    for path in theirs:
        np.testing.assert_allclose(gradients[path], theirs[path], rtol=0, atol=1e-4, err_msg=path)


def test_the_config_of_transformers_gives_the_same_spec(pair):
    spec, _, _, witness = pair
    assert spec_from_config(witness.config.to_dict()) == spec


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padded_rows(pair, left, record_figure):
    """Logits against the same padded batch in torch, gradients against each document alone."""
    _, run, _, witness = pair
    docs = documents(2, [18, 11, 4, 7])
    batch = lay_out([[doc] for doc in docs], left)
    logits, gradients = run(batch)
    assert np.isfinite(logits).all()
    real = batch["segment_ids"] > 0
    with torch.no_grad():
        theirs = witness(
            input_ids=torch.tensor(batch["tokens"][:4]).long(),
            attention_mask=torch.tensor(real[:4]).long(),
            position_ids=torch.tensor(batch["positions"][:4]).long(),
        ).logits.numpy()
    assert 0.5 < theirs.std() < 2, "of another size, an absolute tolerance would mean something else"
    ours, theirs = logits[real], theirs[real[:4]]
    record_figure("logits", np.abs(ours - theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    check_gradients(gradients, pair, docs, record_figure)


def test_packed_documents_do_not_see_each_other(pair, record_figure):
    """Two and three documents in a row have the logits of each document alone, ours and torch's, and its gradients."""
    _, run, _, witness = pair
    docs = documents(3, [6, 9, 5, 3, 7])
    batch = lay_out([docs[:2], docs[2:]])
    packed, gradients = run(batch)
    alone, _ = run(lay_out([[doc] for doc in docs]))
    ours = [
        packed[row][batch["segment_ids"][row] == segment] for row, segment in [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]
    ]
    differences = []
    for index, (tokens, _) in enumerate(docs):
        np.testing.assert_allclose(ours[index], alone[index][: len(tokens)], rtol=0, atol=1e-5)
        theirs = torch_logits(witness, tokens)
        np.testing.assert_allclose(ours[index], theirs, rtol=0, atol=1e-4)
        differences.append(np.abs(ours[index] - theirs).max())
    record_figure("logits", max(differences))
    check_gradients(gradients, pair, docs, record_figure)


def test_the_comparison_of_packed_documents_can_fail(pair):
    """The same row as one segment, or with positions that run on as well, gives the second document other logits."""
    _, run, _, _ = pair
    batch = lay_out([documents(3, [6, 9])])
    separate, _ = run(batch)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    leaking, _ = run(batch | {"segment_ids": np.minimum(batch["segment_ids"], 1), "positions": positions})
    np.testing.assert_array_equal(leaking[0, :6], separate[0, :6])
    assert np.abs(leaking[0, 6:15] - separate[0, 6:15]).max() > 0.1
