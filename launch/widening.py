"""How much a few steps of training move a model's activations, and how that grows with width."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from launch.experiment import ORIGINS, Experiment
from launch.lab import Lab
from models.probe import activations
from models.task import constants_for
from models.transformer import Transformer
from qat.training.processes import place


def changes_of(lab: Lab, experiment: Experiment, steps: int) -> dict[str, float]:
    """Root mean square change of every place's activations by `steps` steps of training.

    Raises:
        ValueError: the experiment names a checkpoint, which has one width alone.
    """
    for name in ORIGINS:
        if name in experiment.config:
            raise ValueError(f"{name} = {experiment.config[name]!r}: expected '' to compare widths")
    programs, model = lab.programs(experiment), experiment.model
    constants = constants_for(model, experiment.policy)
    train, validation = lab.batches(experiment)
    tokens_BT = jnp.asarray(validation.batch_at(0)[:, :-1])
    policy = experiment.policy
    graph = nnx.graphdef(nnx.eval_shape(lambda: Transformer(model, policy, rngs=nnx.Rngs(0))))

    @jax.jit
    def places(params: object) -> dict[str, jax.Array]:
        return activations(nnx.merge(graph, params, constants), tokens_BT)

    state = programs.init_state(jnp.uint32(experiment.config["seed"]))
    before = places(state.params)
    schedule = dataclasses.replace(experiment.schedule, warmup_steps=1)  # full rate at once
    for step in range(steps):
        batch = place(train, step, programs.batch_sharding)
        state, _ = programs.train_step(state, constants, schedule, batch)
    after = places(state.params)
    moved = jax.tree.map(lambda a, b: jnp.sqrt(jnp.mean(jnp.square(a - b))), after, before)
    return {place: float(change) for place, change in moved.items()}


def exponents(widths: Sequence[int], changes: Sequence[dict[str, float]]) -> dict[str, float]:
    """Slope of log change over log width in every place, by least squares."""
    logs_W = np.log(widths)
    return {
        place: float(np.polyfit(logs_W, np.log([change[place] for change in changes]), 1)[0])
        for place in changes[0]
    }
