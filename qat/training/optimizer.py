"""AdamW without its learning rate, which the train step multiplies in from the schedule.

Adam (Kingma & Ba, arXiv 1412.6980) with decoupled weight decay (Loshchilov & Hutter,
arXiv 1711.05101). Defaults are those of Kumar et al. (arXiv 2411.04330).
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from qat.training.sharding import path_name

# Scales of norms, biases, and the learned scales of quantizers.
NOT_DECAYED = ("scale", "bias", r"\w+_value")


def adamw(
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-15,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    not_decayed: Sequence[str] = NOT_DECAYED,
    rates: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """Clipping by global norm, Adam, and weight decay of the matrices.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: share of a parameter removed per unit of learning rate.
        clip_norm: largest global norm of the gradient; 0 does not clip.
        not_decayed: regular expressions of whole names at the end of a "/"-separated path, such
            as "embed/embedding", whose arrays do not decay.
        rates: parameters → factor of each one's update, before decay; None is 1 everywhere.
    """

    def scale(updates: Any, params: Any) -> Any:
        return (
            updates if rates is None else jax.tree.map(lambda u, r: u * r, updates, rates(params))
        )

    inner = optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.scale_by_adam(b1, b2, eps),
        optax.stateless(scale),
        optax.add_decayed_weights(
            weight_decay, mask=lambda params: decay_mask(params, not_decayed)
        ),
    )

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # optax raises a Python float to an int32 power, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates: tuple[Any, Any] = inner.update(grads, state, params)
        return updates

    return optax.GradientTransformation(inner.init, update)


def decay_mask(params: Any, not_decayed: Sequence[str] = NOT_DECAYED) -> Any:
    """True for the leaves that decay."""
    pattern = re.compile(f"(.*/)?({'|'.join(not_decayed)})" if not_decayed else r"(?!)")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not pattern.fullmatch(path_name(path)), params
    )
