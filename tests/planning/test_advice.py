"""Which settings are tried when a run does not fit, and how a search goes on; what compiling tells is made up here."""

import itertools
import types

import pytest

from ftjax import config as configs
from ftjax.errors import UserError
from ftjax.planning import advice, topology
from ftjax.planning.chips import GIB


def config_of(**keys):
    config = configs.defaults()
    config.model.source = "none"
    config.data.batch_size, config.accumulate, config.model.remat = 64, 1, "none"
    return advice.changed(config, **keys).config


def as_it_is(config):
    """Of a config the program, which is the config itself where `compiled` takes the compiler's place."""
    return config


@pytest.fixture
def compiled(monkeypatch):
    """`compiled.plan` without a compiler: too large by 1 GiB for each micro-batch fewer than 4."""

    def plan(config, topology):
        lacking = (4 - config.accumulate) * GIB
        roofline = types.SimpleNamespace(step=1.0 + config.accumulate / 10)
        return types.SimpleNamespace(fits=lacking <= 0, lacking=lacking, roofline=roofline)

    monkeypatch.setattr(advice.compiled, "plan", plan)


@pytest.mark.parametrize(
    ("keys", "first", "has", "lacks"),
    [
        ({}, "model.remat=full", "quantize.base=nf4", "adapter.kind=lora"),
        ({"accumulate": 2}, "model.remat=full", "data.batch_size=16", "adapter.kind=lora"),
        ({"model__remat": "full"}, "accumulate=2", "quantize.base=int8", "adapter.kind=lora"),
        ({"model__remat": "full", "accumulate": 4}, "model.remat=offload", "mesh.context=2", "accumulate=4"),
        ({"model__remat": "full", "mesh__data": 4}, "mesh.data=1", "quantize.base=nf4", "adapter.kind=lora"),
        ({"adapter__kind": "none", "model__remat": "full"}, "accumulate=2", "adapter.kind=lora", "quantize.base=nf4"),
        (
            {"adapter__kind": "none", "objective__name": "dpo", "model__remat": "full"},
            *("objective.cache_reference=True", "accumulate=2", "quantize.base=nf4"),
        ),
        ({"objective__name": "dpo"}, "model.remat=full", "quantize.base=nf4", "objective.cache_reference=True"),
        ({"quantize__base": "int8"}, "model.remat=full", "quantize.base=nf4", "quantize.base=int8"),
    ],
)
def test_what_is_tried_when_a_run_does_not_fit(keys, first, has, lacks):
    tried = list(advice.remedies(config_of(**keys), topology.parse("v5e:4x4")))
    changes = [one.changes for one in tried]
    assert changes[0][0] == first
    assert any(has in one for one in changes)
    assert not any(lacks in one for one in changes)
    assert len(set(changes)) == len(changes)
    assert len(tried) <= advice.MOST  # none is left out
    for one in tried:
        configs.validate(one.config, data=False)


def test_several_slices_keep_data_between_them():
    tried = advice.remedies(config_of(mesh__data=4, model__remat="full"), topology.parse("2x v5e:4x4"))
    assert "mesh.data=2" in next(tried).changes


def test_a_setting_that_cannot_be_is_told_and_passed_over(compiled):
    def refuse(config):
        raise UserError("no such thing")

    told = []
    tried = advice.try_all(iter([advice.changed(config_of(), accumulate=2)]), refuse, None, told.append)
    assert (tried[0].plan, tried[0].reason) == (None, "no such thing")
    assert told == ["compiling --config.accumulate=2", "  not possible: no such thing"]


def test_a_search_takes_more_micro_batches_where_the_estimate_was_wrong(monkeypatch, compiled):
    ways = [[advice.changed(config_of(), accumulate=count, mesh__data=data) for count in (1, 4)] for data in (1, 2, 4)]
    monkeypatch.setattr(advice, "_ways", lambda *_: iter(ways))
    tried = advice.search(None, None, None, as_it_is, lambda text: None)
    assert [(one.candidate.config.accumulate, one.plan.fits) for one in tried] == [(1, False), (4, True)] * 3
    assert len(advice.fitting(tried)) == 3


def test_a_search_ends(monkeypatch, compiled):
    """After BEST settings that fit, or MOST compiles."""
    for count, expected in ((4, advice.BEST), (1, advice.MOST)):
        ways = itertools.repeat([advice.changed(config_of(), accumulate=count)], 20)
        monkeypatch.setattr(advice, "_ways", lambda *_, ways=ways: ways)
        assert len(advice.search(None, None, None, as_it_is, lambda text: None)) == expected
