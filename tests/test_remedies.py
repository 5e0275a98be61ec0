"""Against forgetting: general data that is replayed, KL to the model before training on it, L2-SP."""

import json

import numpy as np
import pytest
from support.pairs import config_of
from support.runs import write_model, write_rows

from ftjax import assemble, preflight, train
from ftjax import config as configs
from ftjax.data import pipeline
from ftjax.errors import UserError
from ftjax.method import method_of
from ftjax.training import metrics

DPO = {"objective.name": "dpo", "data.train_on": "assistant"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("remedies")
    write_model(root / "model")
    write_rows(root / "rows.jsonl", 40)
    texts = ["The sea is wide and the hills are old. " * (1 + i % 3) for i in range(30)]
    (root / "general.jsonl").write_text(
        "".join(json.dumps({"text": f"{i}. {text}"}) + "\n" for i, text in enumerate(texts))
    )
    return root


def config_for(root, replay=None, **changes):
    """All turns are trained, so that both sources are learned from at a like rate."""
    sources = (str(root / "rows.jsonl"),)
    if replay:
        sources += ({"source": str(root / "general.jsonl"), "replay": replay},)
    given = {
        "objective.name": "sft",
        "data.train": sources,
        "data.train_on": "all",
        "data.checks": "off",
        "log_every": 1,
    }
    return config_of(root, **given | {"log_every": 1} | changes)


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_the_share_of_what_is_replayed_is_that_of_the_trained_tokens(root, share):
    config = config_for(root, share, **{"data.holdout": 0.2})
    base = assemble.open_base(config.model)
    entries, spec = configs.sources(config, "train"), assemble.data_spec(config, base.model.spec)
    loader, _ = pipeline.load(entries, base.tokenizer, spec)
    batches = [loader.batch(index) for index in range(loader.batches_in(20))]
    assert batches[0].keys() == method_of(config).batch.keys()
    replayed = sum((batch["weights"] * batch["replay"]).sum() for batch in batches)
    assert replayed / sum(batch["weights"].sum() for batch in batches) == pytest.approx(share, rel=0.03)
    # What is marked are whole documents, of texts: all but their first tokens are trained.
    for batch in batches:
        marked = (batch["replay"] > 0) & (batch["segment_ids"] > 0)
        np.testing.assert_array_equal(marked, batch["replay"] > 0)
        last = marked & (batch["targets"] == 0)
        assert (batch["weights"][marked & ~last] == 1).all()
    held = pipeline.load_heldout([], entries, base.tokenizer, spec)
    assert not any("replay" in batch for batch in held.eval_batches())
    assert all(
        ".jsonl" in (origin := held.examples.origin(i)) and "general" not in origin for i in range(len(held.examples))
    )


@pytest.mark.slow
def test_a_resumed_run_with_all_of_them_is_the_same(root, tmp_path):
    settings = {"objective.kl_coef": 0.5, "optimizer.l2_sp": 0.1, "checkpoint_every": 2, "accumulate": 2}
    config = config_for(root, 0.3, **settings, **{"data.eval": (str(root / "rows.jsonl"),), "evaluate.before": False})
    assert train.train(config, tmp_path / "run") == 0
    whole = metrics.read(tmp_path / "run/metrics.jsonl")
    *steps, end = whole
    assert steps[0]["kl"] == pytest.approx(0, abs=2e-6)
    assert steps[-1]["kl"] > 1e-4
    assert {"eval_loss", "eval_cross_entropy"} <= end.keys()
    assert "eval_kl" not in end
    config.checkpoint.resume_step = 2
    assert train.train(config, tmp_path / "run") == 0
    again = metrics.read(tmp_path / "run/metrics.jsonl")
    names = ("loss", "kl", "cross_entropy", "grad_norm", "eval_loss")
    assert [[record.get(name) for name in names] for record in again] == [
        [record.get(name) for name in names] for record in whole
    ]


@pytest.mark.parametrize(
    ("replay", "changes", "message"),
    [
        (None, {"objective.kl_coef": 0.1}, "kl_coef=0.1 does nothing without rows that are replayed"),
        (1.5, {}, "must be a share between 0 and 1"),
        (0.5, {"data.train": ({"source": "a", "replay": 0.5},)}, "must leave room for a source without"),
        (0.5, {"data.train": ("a", {"source": "b", "replay": 0.5, "weight": 2.0})}, "'weight' and 'replay' of b both"),
        (0.5, {"data.eval": ({"source": "a", "replay": 0.5},)}, "'replay', which is for data.train"),
        (
            0.5,
            {"objective.name": "dpo", "data.train_on": "assistant"},
            "'replay' is for conversations and texts, which 'dpo' does not learn",
        ),
        (
            0.5,
            DPO | {"objective.kl_coef": 0.1},
            r"does not use it \(of sft, grpo, rloo, ppo\)",
        ),
    ],
)
def test_what_does_nothing_or_has_no_meaning_is_refused(root, replay, changes, message):
    def begin():
        config = config_for(root, replay, **changes)
        preflight.check_used(config)
        method_of(config)

    with pytest.raises(UserError, match=message):
        begin()
