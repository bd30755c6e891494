"""µP keeps the size of updates when a model gets wider; the unscaled rule does not."""

import jax
import pytest

from configs import experiment
from launch.experiment import Experiment
from launch.lab import Lab
from launch.widening import changes_of, exponents

WIDTHS = (64, 256)


def measured(corpus, rule, policy):
    config = experiment.get_config()
    config.data.source = f"folder:{corpus}"
    config.data.sequence_length = 32
    config.data.validation_fraction = 0.2
    config.learning_rate = 6e-3
    config.batch_size = 16
    config.policy = policy
    config.scaling.rule = rule
    config.scaling.base_width = WIDTHS[0]
    config.scaling.base_heads = config.model.heads
    lab, changes = Lab(corpus.parent / "data", jax.devices()[:1]), []
    for width in WIDTHS:
        config.model.width = width
        changes.append(changes_of(lab, Experiment.from_config(config.to_dict()), steps=8))
    return exponents(WIDTHS, changes)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "w4a8"])
def test_updates_keep_their_size_under_mup(corpus, policy):
    slopes = measured(corpus, "mup", policy)
    assert set(slopes) == {"embed", "block 0", "block 1", "logits"}
    assert max(abs(slope) for slope in slopes.values()) < 0.15


@pytest.mark.slow
def test_updates_grow_without_a_rule(corpus):
    assert measured(corpus, "fixed", "none")["block 1"] > 0.4


def test_an_exponent_is_the_slope_of_logarithms():
    changes = [{"a": width**0.5, "b": 3.0} for width in (10, 100, 1000)]
    slopes = exponents((10, 100, 1000), changes)
    assert slopes["a"] == pytest.approx(0.5)
    assert slopes["b"] == pytest.approx(0)
