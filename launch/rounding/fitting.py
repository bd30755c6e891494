"""The precision in which a variant runs, and whether the model can: asked before anything is made.

The model is traced alone, without text and without its weights.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from launch.rounding.grid import Variant
from launch.rounding.subject import Subject
from models.transformer import Transformer
from qat.policy import Policy
from qat.ptq.blocks import nearest_fitting
from qat.quantizer import Quantizer

SKIP = "embed|head|.*/router"  # stay unquantized, as in training


def running_policy(trained: Policy, variant: Variant) -> Policy | None:
    """What a variant's model quantizes as it runs: what it was trained with, but for changes.

    The weights of a variant lie rounded in its kernels.
    """
    operands: dict[str, Any] = {n: q for n, q in trained.operands().items() if q and q.quantizes}
    operands.pop("gradients", None)
    if variant.weights is not None:
        operands.pop("weights", None)
    changed = {"activations": variant.activations, "kv_cache": variant.kv_cache}
    operands |= {name: q for name, q in changed.items() if q is not None}
    return Policy(**operands) if operands else None


def check(subject: Subject, asked: Sequence[Variant]) -> None:
    """Raises ValueError for a format that does not fit the model, such as too large a block."""
    seen: set[str] = set()
    for variant in asked:
        policy = _policy(subject, variant)
        if policy.structure not in seen:
            seen.add(policy.structure)
            if (error := _objection(subject, policy)) is not None:
                raise ValueError(f"{variant}: {_advice(subject, variant) or error}")


def _policy(subject: Subject, variant: Variant) -> Policy:
    """Of a variant as if it rounded its weights as it ran."""
    running = running_policy(subject.policy, variant) or Policy()
    return dataclasses.replace(running, weights=variant.weights)


def _objection(subject: Subject, policy: Policy) -> ValueError | None:
    try:
        jax.eval_shape(functools.partial(_forward, subject, policy))
    except ValueError as error:
        return error
    return None


def _advice(subject: Subject, variant: Variant) -> str | None:
    """The nearest format whose blocks divide the inputs of every layer; None if that is not it."""

    def fits(other: Quantizer) -> bool:
        return _objection(subject, _policy(subject, variant.resized(other.block_size))) is None

    quantizer = variant.weights or variant.kv_cache
    lengths = (subject.config.width, subject.config.channels)
    if quantizer is None or (nearest := nearest_fitting(quantizer, lengths, fits)) is None:
        return None
    return (
        f"block size {quantizer.block_size} does not divide every layer; "
        f"nearest that does is {str(nearest)!r}"
    )


def _forward(subject: Subject, policy: Policy) -> jax.Array:
    """Logits of a model made anew; to be traced alone."""
    model = Transformer(subject.config, policy, rngs=nnx.Rngs(0))
    logits_BTV: jax.Array = model(jnp.zeros((1, 2), jnp.int32))
    return logits_BTV
