"""Rules of size against their table, and what they are for: updates that keep their size."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from models.task import AXES, language_model, scaled
from models.transformer import TransformerConfig
from qat.training.scaling import Scaling

CONFIG = TransformerConfig(vocabulary=32, width=32, layers=4, heads=4, kv_heads=2)
SPARSE = dataclasses.replace(CONFIG, experts=4)
# Array: (initial values, rate) at four times the width and nine times the depth.
EXPECTED = {
    "embed/embedding": (2, 1),
    "head/kernel": (1 / 2, 1 / 4),
    "norm/scale": (1, 1),
    "blocks/attention_norm/scale": (1, 1 / 3),
    "blocks/attention/qkv/kernel": (1, 1 / 12),
    "blocks/attention/out/kernel": (1, 1 / 12),
    "blocks/mlp/gate_up/kernel": (1, 1 / 12),
    "blocks/mlp/down/kernel": (1, 1 / 12),
    "blocks/router/kernel": (1 / 2, 1 / 12),
}


def leaf(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return tree


@pytest.fixture(scope="module", params=[CONFIG, SPARSE], ids=["dense", "sparse"])
def params(request):
    return jax.jit(language_model(request.param, None).init)(jax.random.key(0))


@pytest.mark.parametrize("path", EXPECTED)
def test_mup_and_depth_mup_follow_their_table(path, params):
    """Whether there are experts or not; without them there is no router."""
    if "router" in path and "router" not in params["blocks"]:
        return
    scaling = Scaling.of("mup", width=4, depth=9, channels=4)
    initial, rate = EXPECTED[path]
    rescaled = scaling.initial_values(params, AXES)
    assert jnp.allclose(leaf(rescaled, path), initial * leaf(params, path))
    assert leaf(scaling.rates(params, AXES), path) == pytest.approx(rate)


def test_the_model_gets_its_factors():
    config = scaled(CONFIG, Scaling.of("mup", width=4, depth=9, channels=4))
    assert config.score_scale == pytest.approx(8**-0.5 / 2)
    assert config.residual_scale == pytest.approx(1 / 3)


def test_attention_scores_are_divided_by_channels_when_heads_widen():
    base, wide = Scaling(), Scaling.of("mup", width=4, depth=1, channels=4)
    assert base.attention_scale(16) == 16**-0.5
    assert wide.attention_scale(64) == pytest.approx(base.attention_scale(16) / 4)


def test_depth_mup_leaves_widths_alone():
    assert Scaling.of("depth-mup", 4, 9, 4) == Scaling(1.0, 9, 1.0)
    assert Scaling.of("fixed", 4, 9, 4) == Scaling()


def test_unscaled_training_is_as_before():
    config = scaled(CONFIG, Scaling())
    assert config.residual_scale == 1
    assert config.score_scale == CONFIG.score_scale


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mpu", 1, 1, 1), "unknown scaling rule 'mpu': .* nearest is 'mup'"),
        (("mup", 0, 1, 1), "scaling by width 0: expected a positive ratio"),
        (("mup", 1, float("nan"), 1), "scaling by depth nan"),
    ],
)
def test_bad_rules_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Scaling.of(*arguments)
