"""scripts/growth.py: what it measures, and how it says and draws it."""

import xml.etree.ElementTree as ElementTree

import pytest
from support import ROOT


@pytest.fixture(scope="module")
def growth():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        import growth

        yield growth


def test_the_table_says_how_the_last_is_to_the_first(growth):
    found = [growth.Growth("seconds of a step", "tokens", "linear", [(256, 0.5), (1024, 2.25)])]
    assert growth.table(found).splitlines()[2] == (
        "| seconds of a step | tokens | 0.5 at 256, 2.25 at 1,024; 4 times as many: 4.50 times | linear |"
    )


def test_the_plot_has_a_panel_with_every_point_of_each(growth):
    found = [growth.Growth(f"what {i}", "over", "flat", [(1, 2.0), (2, 2.5), (4, 2.25)]) for i in range(4)]
    drawn = ElementTree.fromstring(growth.plot(found))
    tags = [element.tag.rpartition("}")[2] for element in drawn.iter()]
    assert (tags.count("polyline"), tags.count("circle")) == (4, 12)


def test_memory_of_a_step_does_not_grow_with_the_length_of_rows(growth, record_figure):
    """Attention keeps no scores."""
    short, long = (growth.step_memory(2048 // length, length, num_hidden_layers=2) for length in (256, 2048))
    record_figure("times the memory of short rows", long / short)
    assert long < 1.1 * short
