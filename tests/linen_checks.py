"""What the tests of the Linen door share: layers, a stack, and ways to run and compare modules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import qat.linen
from qat.contractions import find_contractions
from qat.policy import Policy
from qat.quantization import fake_quant
from qat.quantizer import Quantizer

W4A8 = Policy.parse("w4a8")
SPELLED = "weights int4/channel, activations int8/tensor"
KEY = jax.random.key(0)


def policy_of(**spellings):
    return Policy(**{name: Quantizer.parse(text) for name, text in spellings.items()})


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantized(x, spelling, axis):
    return fake_quant(x, Quantizer.parse(spelling), axis)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _apply(module, variables, x, method, mutable):
    return module.apply(variables, *x, method=method, mutable=mutable)


def apply(module, variables, *x, method=None, mutable=False):
    """What a module computes, compiled."""
    return _apply(module, variables, x, method, mutable)


def variables_of(module, *x):
    """Random variables in the shapes of `init`, which would have to be compiled."""
    shapes = jax.eval_shape(lambda: module.init(KEY, *x))
    random = np.random.default_rng(1)

    def filled(leaf):  # vectors stay positive, as variances must
        low = 0.5 if leaf.ndim < 2 else -1.5
        return jnp.asarray(random.uniform(low, 1.5, leaf.shape), leaf.dtype)

    return jax.tree.map(filled, shapes)


@functools.partial(jax.jit, static_argnums=0)
def init(module, *x):
    return module.init(KEY, *x)


def traced(module, variables, *x, **kwargs):
    """How each contraction of a module is quantized, without running it."""
    found = find_contractions(functools.partial(module.apply, **kwargs), variables, *x)
    return [contraction.quantized for contraction in found]


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def lines(report):
    """Path, verdict pairs: how quantized, or why not."""
    return [(line.path, line.quantized or line.reason) for line in report]


# name: (arguments, shape of the input or None for integer ids)
LAYERS = {
    "Dense": ((3,), (2, 5, 4)),
    "DenseGeneral": (((3, 2), (-2, -1)), (6, 5, 4)),
    "Einsum": (((4, 2, 3), "...d,dhk->...hk"), (6, 4)),
    "Conv": ((3, (2, 2)), (2, 5, 5, 4)),
    "Embed": ((7, 4), None),
}


def layer_input(name):
    shape = LAYERS[name][1]
    return jnp.asarray([[0, 6], [3, 3]]) if shape is None else normal(*shape)


def of_flax(name):
    return getattr(nn, name)(*LAYERS[name][0])


def of_ours(name, policy):
    return getattr(qat.linen, name)(*LAYERS[name][0], policy=policy)


class Block(nn.Module):
    policy: Policy | None = None

    @nn.compact
    def __call__(self, x, _=None):
        return x + qat.linen.Dense(4, policy=self.policy)(nn.LayerNorm()(x)), None


class Stack(nn.Module):
    """Scanned, rematerialized blocks."""

    policy: Policy | None = None

    @nn.compact
    def __call__(self, x):
        block = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0, "ranges": 0},
            split_rngs={"params": True, "noise": True},
            length=3,
        )
        return block(self.policy, name="blocks")(x, None)[0]
