"""Vision-language models against transformers' torch models of them: float32, small random configs, images in rows.

Logits and gradients to 1e-4, the tower's among them. The weights go through files that transformers writes.
"""

import copy

import jax
import numpy as np
import pytest
import torch
from support.tiny import one_device
from support.vision import CONFIGS, IMAGE, pictured, pictured_batch, torch_gradients, torch_logits, torch_model

from ftjax import tree
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.params import abstract_params
from ftjax.models.vision import images_of
from ftjax.objectives.sft import make_sft
from ftjax.weights.load import load_params
from ftjax.weights.source import open_source

ROWS, LENGTH, PATCHES = 3, 96, 144  # of every batch here, so that each config is compiled once
INPUTS = ("tokens", "positions", "segment_ids")


def read(path):
    reader = open_source(path)
    decoder = Decoder(spec_from_config(reader.config, vision=True))
    return decoder, load_params(reader, decoder.spec, abstract_params(decoder, one_device()))


class Case:
    """One config: `torch`, its model in transformers; `decoder` and `params`, ours; `run` of a batch."""

    def __init__(self, config, path):
        self.path, self.torch = path, torch_model(config)
        self.torch.save_pretrained(path / "model")
        self.decoder, self.params = read(path / "model")
        self.vision = self.decoder.spec.vision
        objective = make_sft(self.decoder)

        @jax.jit
        def run(params, batch):
            variables = {"params": params}
            hidden, _ = self.decoder.apply(variables, *(batch[name] for name in INPUTS), images=images_of(batch))
            logits = self.decoder.apply(variables, hidden, method=self.decoder.unembed)
            gradients = jax.grad(lambda params: objective({"params": params}, batch, jax.random.key(0)).sum)(params)
            return logits, gradients

        self.run = lambda batch: jax.device_get(run(self.params, batch))

    def doc(self, texts, seed):
        """Text around len(texts) - 1 images."""
        grid = self.vision.grid
        sizes = [(grid, grid)] * 9 if grid else SIZES[seed % len(SIZES) :] + SIZES
        return pictured(self.vision, sizes[: len(texts) - 1], texts, seed)

    def batch(self, rows):
        return pictured_batch(self.torch, self.vision, rows + [[]] * (ROWS - len(rows)), LENGTH, PATCHES)

    def torch_gradients(self, docs):
        """Torch's gradients of the summed loss as a tree of ours: they travel as if they were weights."""
        carrier, gradients = copy.deepcopy(self.torch), torch_gradients(self.torch, self.vision, docs)
        with torch.no_grad():
            for name, parameter in carrier.named_parameters():
                parameter.copy_(gradients[name])
        carrier.save_pretrained(self.path / "gradients")
        return read(self.path / "gradients")[1]


# Of images of any size, in patches: with whole and broken windows, wide and high.
SIZES = [(4, 4), (2, 6), (8, 6), (2, 2), (6, 10)]


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
