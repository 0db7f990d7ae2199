"""What `sixfold sample` may change of a recipe's sampling."""

import pytest

from sixfold.errors import UserError
from sixfold.recipe.load import load_recipe
from sixfold.samplers.config import CFGConfig, CFGZeroConfig, NoGuidanceConfig
from sixfold.train.sampling import SampleOptions, adjusted

RECIPE = load_recipe("flow/dit-smoke", ["sampling.steps=7", "sampling.grid.shift=2.0"]).recipe


def sampling_with(**options):
    return adjusted(RECIPE, SampleOptions(count=1, **options)).sampling


def test_another_sampler_keeps_what_it_shares():
    changed = sampling_with(sampler="dpm_solver")
    assert (changed.type, changed.steps, changed.grid.shift) == ("dpm_solver", 7, 2.0)
    assert sampling_with(sampler="rk45").type == "rk45"
    assert sampling_with() == RECIPE.sampling


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2.5", CFGConfig(scale=2.5)),
        ("cfg_zero", CFGZeroConfig()),
        ("cfg_zero:3", CFGZeroConfig(scale=3.0)),
        ("none", NoGuidanceConfig()),
    ],
)
def test_guidance_is_read(text, expected):
    assert sampling_with(guidance=text).guidance == expected


def test_a_scale_alone_changes_the_present_guidance():
    guided = adjusted(RECIPE, SampleOptions(count=1, guidance="cfg_zero:2"))
    assert adjusted(guided, SampleOptions(count=1, guidance="3")).sampling.guidance == CFGZeroConfig(scale=3.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "hein"}, "did you mean heun"),
        ({"sampler": "autoregressive"}, "no sampler 'autoregressive'"),
        ({"guidance": "strong"}, "no guidance 'strong'"),
        ({"guidance": "cfg:much"}, "no guidance 'cfg:much'"),
        ({"guidance": "nan"}, "no guidance 'nan'"),
        ({"guidance": "-1"}, "greater than or equal to 0"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(options, message):
    with pytest.raises(UserError, match=message):
        sampling_with(**options)
