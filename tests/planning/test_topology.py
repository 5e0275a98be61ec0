"""Names of topologies, and what their links bring."""

import pytest

from ftjax.errors import UserError
from ftjax.planning import chips, roofline, topology
from ftjax.planning.compiled import exceeded


@pytest.mark.parametrize(
    ("text", "chips", "slices"),
    [("v5e:4x4", 16, 1), ("v5p:2x2x2", 8, 1), ("2x v5e:4x4", 32, 2), ("v5e:4x4*2", 32, 2), ("v6e:16x16", 256, 1)],
)
def test_topologies(text, chips, slices):
    found = topology.parse(text)
    assert (found.chips, found.slices) == (chips, slices)
    assert topology.parse(str(found)) == found


@pytest.mark.parametrize(
    "text", ["v5e", "v5e:4", "v5p:4x4", "v9:4x4", "2x v5e:4x4*2", "0x v5e:4x4", "v5e:0x4", "h100:8"]
)
def test_what_is_no_topology_is_told(text):
    with pytest.raises(UserError):
        topology.parse(text)


def test_a_line_brings_half_of_what_a_ring_does():
    link = chips.CHIPS["v5e"].link
    assert roofline.bandwidth(topology.parse("v5e:4x4"), (0, 1)) == 2 * link
    assert roofline.bandwidth(topology.parse("v5e:16x16"), (0, 1)) == 4 * link
    assert roofline.bandwidth(topology.parse("v5e:4x16"), (1,)) == 2 * link
    assert roofline.bandwidth(topology.parse("v5p:2x2x2"), (0, 1, 2)) == 3 * chips.CHIPS["v5p"].link
    assert roofline.bandwidth(topology.parse("v5p:4x4x4"), (2,)) == 2 * chips.CHIPS["v5p"].link


def test_the_compilers_errors_are_read():
    assert (
        exceeded(
            "RESOURCE_EXHAUSTED: E1000: the total memory required for HLO temporaries (64.00G) exceeds available "
            "HBM (15.75G). HLO module: jit_step"
        )
        == 48.25 * 2**30
    )
    old = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm."
    assert exceeded(old) == 1.75 * 2**30
    assert exceeded("INVALID_ARGUMENT: something else") is None
