"""AdamW without its learning rate, which the train step multiplies in from the schedule.

Adam (Kingma & Ba, arXiv 1412.6980) with decoupled weight decay (Loshchilov & Hutter,
arXiv 1711.05101). Defaults are those of Kumar et al. (arXiv 2411.04330).
"""

from typing import Any

import jax
import optax

_NOT_DECAYED = ("scale", "bias")


def adamw(
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-15,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Clipping by global norm, Adam, and weight decay of everything but scales and biases.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: share of a parameter removed per unit of learning rate.
        clip_norm: largest global norm of the gradient; 0 does not clip.
    """
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    inner = optax.chain(
        clip,
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
    )

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # optax raises a Python float to an int32 power, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates: tuple[Any, Any] = inner.update(grads, state, params)
        return updates

    return optax.GradientTransformation(inner.init, update)


def decay_mask(params: Any) -> Any:
    """True for the leaves that decay, by the last name of their path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in _NOT_DECAYED, params
    )
