"""Classes of documents and of steps, against transformers' models for sequence and for token classification."""

import jax
import numpy as np
import pytest
import torch
from support.tiny import CONFIG, batch_of, documents, numpy_params, spec
from support.witness import from_torch, to_torch, torch_scores
from transformers import LlamaConfig, LlamaForTokenClassification

from ftjax import config as configs
from ftjax import tree
from ftjax.models.decoder import Decoder
from ftjax.objectives.classify import make_classify, make_prm

MODEL = Decoder(spec())
DOCUMENTS = documents(0, [9, 6, 12, 7])
CLASSES = (2, 0, 1, 0)
STEPS = ({3: 1, 8: -1}, {5: 1}, {2: -1, 6: 1, 11: 1}, {6: -1})  # of each document: {token: right or wrong}
# Several to a row, or each alone and padded on the left.
LAYOUTS = {"packed": ([[0, 1], [2, 3], [], []], False), "alone": ([[2], [0], [3], [1]], True)}


def batch_with(layout, label):
    """label: (document, its length) -> float32 [length]"""
    rows, left = LAYOUTS[layout]
    batch = batch_of([[DOCUMENTS[i] for i in row] for row in rows], 24, left)
    batch["labels"] = np.zeros(batch["tokens"].shape, np.float32)
    for r, row in enumerate(rows):
        for segment, i in enumerate(row, 1):
            batch["labels"][r][batch["segment_ids"][r] == segment] = label(i, len(DOCUMENTS[i][0]))
    return batch


def steps_of(i, length):
    return np.array([STEPS[i].get(token, 0) for token in range(length)], np.float32)


def kernel_of(classes):
    return np.random.default_rng(1).standard_normal((CONFIG["hidden_size"], classes)).astype(np.float32)


def classified_by_torch(params):
    model = torch_scores(CONFIG, params, kernel_of(3))
    total, right = 0.0, 0
    for (tokens, _), label in zip(DOCUMENTS, CLASSES):
        out = model(input_ids=torch.tensor(tokens, dtype=torch.long)[None], labels=torch.tensor([label]))
        total, right = total + out.loss, right + int(out.logits.argmax() == label)
    return model, total, right, len(DOCUMENTS)


def steps_by_torch(params):
    settings = {"classifier_dropout": 0.0, "attn_implementation": "eager", "num_labels": 2}
    model = LlamaForTokenClassification(LlamaConfig(**CONFIG, **settings)).eval()
    head = {"score.weight": torch.tensor(kernel_of(2).T), "score.bias": torch.zeros(2)}
    model.load_state_dict(to_torch(params) | head, strict=True)
    total, right = 0.0, 0
    for i, (tokens, _) in enumerate(DOCUMENTS):
        signs = torch.tensor(steps_of(i, len(tokens)))
        labels = torch.where(signs == 0, -100, (signs > 0).long())
        out = model(input_ids=torch.tensor(tokens, dtype=torch.long)[None], labels=labels[None])
        total = total + out.loss * len(STEPS[i])  # its own is the mean over the steps
        right += int((out.logits[0].argmax(-1) == labels).sum())
    return model, total, right, sum(map(len, STEPS))


CASES = {
    "classify": (make_classify, classified_by_torch, 3, lambda i, n: np.full(n, CLASSES[i], np.float32)),
    "prm": (make_prm, steps_by_torch, 2, steps_of),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_accuracy_and_gradients_are_those_of_transformers_however_documents_lie_in_rows(name, record_figure):
    make, by_torch, classes, label = CASES[name]
    params = numpy_params(MODEL, 0)
    model, total, right, count = by_torch(params)
    total.backward()
    gradients = {path: leaf.grad for path, leaf in model.named_parameters() if path != "score.bias"}
    head = gradients.pop("score.weight").numpy().T
    theirs = from_torch(gradients, params) | {"head": head}
    objective = make(MODEL, configs.defaults().objective)

    def sums(variables, batch):
        loss = objective(variables, batch, None)
        return loss.sum, loss

    compiled = jax.jit(jax.grad(sums, has_aux=True))
    variables = {"params": params, "heads": {"score": {"kernel": kernel_of(classes)}}}
    for layout in LAYOUTS:
        found, loss = jax.device_get(compiled(variables, batch_with(layout, label)))
        np.testing.assert_allclose(loss.sum, total.item(), rtol=1e-5)
        assert float(loss.weight) == count
        assert tuple(map(float, loss.metrics["accuracy"])) == (right, count)
        assert 0 < right < count
        ours = tree.flatten(found["params"]) | {"head": found["heads"]["score"]["kernel"]}
        largest = max(np.abs(leaf).max() for leaf in theirs.values())
        worst = max(np.abs(ours[path] - theirs[path]).max() for path in theirs) / largest
        assert worst < 1e-5
        record_figure(f"gradients, {name}, {layout}", worst)
