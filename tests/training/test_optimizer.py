"""AdamW against its definition in float64."""

import jax.numpy as jnp
import numpy as np

from qat.training.optimizer import adamw


def test_updates_follow_adamw_in_float64():
    rng = np.random.default_rng(0)
    kernel, scale = rng.normal(size=(3, 4)), rng.normal(size=(4,))
    grads = [{"kernel": rng.normal(size=(3, 4)), "scale": rng.normal(size=4)} for _ in range(5)]
    b1, b2, eps, decay = 0.9, 0.95, 1e-15, 0.1
    optimizer = adamw(b1, b2, eps, decay, clip_norm=0.0)
    params = {"kernel": jnp.asarray(kernel, jnp.float32), "scale": jnp.asarray(scale, jnp.float32)}
    state = optimizer.init(params)
    mean = dict.fromkeys(params, 0.0)
    square = dict.fromkeys(params, 0.0)
    for step, grad in enumerate(grads, start=1):
        updates, state = optimizer.update(
            {name: jnp.asarray(g, jnp.float32) for name, g in grad.items()}, state, params
        )
        for name, g in grad.items():
            mean[name] = b1 * mean[name] + (1 - b1) * g
            square[name] = b2 * square[name] + (1 - b2) * g**2
            expected = (mean[name] / (1 - b1**step)) / (
                np.sqrt(square[name] / (1 - b2**step)) + eps
            )
            if name == "kernel":
                expected = expected + decay * kernel
            np.testing.assert_allclose(updates[name], expected, rtol=2e-5)


def test_gradients_are_clipped_by_their_global_norm():
    grads = {"kernel": jnp.full((10, 10), 3.0)}
    clipped, unclipped = adamw(clip_norm=1.0), adamw(clip_norm=0.0)
    params = {"kernel": jnp.zeros((10, 10))}
    # Adam is blind to the size of one gradient, so its first moment is what shows the clipping.
    moment = lambda optimizer: optimizer.update(grads, optimizer.init(params), params)[1][1].mu  # noqa: E731
    norm = float(jnp.linalg.norm(moment(clipped)["kernel"])) / 0.1
    assert np.isclose(norm, 1.0, rtol=1e-5)
    assert np.isclose(float(jnp.linalg.norm(moment(unclipped)["kernel"])) / 0.1, 30.0, rtol=1e-5)
