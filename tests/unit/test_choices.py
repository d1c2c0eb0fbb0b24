import pytest

from models import decoder_config
from nestlm.elastic.axes.attn_heads import AttnHeads
from nestlm.elastic.axes.base import search_space
from nestlm.elastic.axes.mlp_width import MLPWidth
from nestlm.errors import ConfigError
from nestlm.spec import Site


def test_widths_are_rounded_to_a_multiple_but_the_full_width_stays():
    space = search_space((MLPWidth(fractions=(0.3, 0.5, 1.0), multiple_of=5),), decoder_config(num_kv_groups=4))
    assert space.choices[Site("mlp_width", 0)] == (5, 10, 24)


def test_heads_are_cut_by_kv_group():
    config = decoder_config(num_kv_groups=2)
    space = search_space((AttnHeads(fractions=(0.5, 1.0)),), config)
    assert space.choices[Site("attn_heads", 0)] == (1, 2)
    assert AttnHeads(fractions=(1.0,)).resize(config.blocks[0], 1).num_heads == 2


def test_fractions_whose_widths_meet_are_one_choice():
    space = search_space((AttnHeads(fractions=(0.25, 0.5, 0.75, 1.0)),), decoder_config(num_kv_groups=2))
    assert space.choices[Site("attn_heads", 0)] == (1, 2)
    space = search_space((MLPWidth(fractions=(0.5, 0.9, 1.0), multiple_of=16),), decoder_config(num_kv_groups=2))
    assert space.choices[Site("mlp_width", 0)] == (16, 24), "none is above the full width"


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        (AttnHeads(fractions=(0.1, 1.0)), "rounds to 0"),
        (MLPWidth(fractions=(0.01, 1.0), multiple_of=4), "rounds to 0"),
        (AttnHeads(fractions=(0.5, 0.75)), "end in 1.0"),
        (AttnHeads(fractions=(0.75, 0.5, 1.0)), "ascending"),
        (AttnHeads(fractions=()), "ascending"),
        (MLPWidth(fractions=(0.5, 1.0), multiple_of=0), "positive"),
    ],
)
def test_choices_that_cannot_be(axis, message):
    with pytest.raises(ConfigError, match=message):
        search_space((axis,), decoder_config(num_kv_groups=2))


def test_no_axes():
    with pytest.raises(ConfigError, match="at least one"):
        search_space((), decoder_config(num_kv_groups=2))
