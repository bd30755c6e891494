"""Analytic FLOPs against the compiler's count."""

import jax
import jax.numpy as jnp

from models.task import constants_for, language_model, matrix_params
from models.transformer import TransformerConfig
from qat.training.flops import forward_flops_per_token, train_flops


def test_analytic_flops_agree_with_the_compiler_for_one_layer():
    """XLA counts a scan's body once, which for one layer is right; norms and softmax are extra."""
    config = TransformerConfig(width=128, layers=1, heads=4, kv_heads=2, vocabulary=512)
    task = language_model(config, None)
    params = jax.eval_shape(task.init, jax.random.key(0))
    tokens_BT = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    constants = constants_for(config, None)
    lowered = jax.jit(task.apply).lower(params, constants, jax.random.key(0), tokens_BT)
    counted = lowered.compile().cost_analysis()["flops"]
    analytic = 512 * forward_flops_per_token(matrix_params(config), 1, 128, 256)
    assert analytic < counted < 1.1 * analytic


def test_training_costs_three_forward_passes():
    assert train_flops(10, 1000, 2, 8, 16) == 30 * forward_flops_per_token(1000, 2, 8, 16)
