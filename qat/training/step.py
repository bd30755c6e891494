"""The compiled programs of one model shape: initialise, train, evaluate.

Training asks two functions of a model: parameters from a key, and logits from parameters,
constants and tokens. The constants are whatever else the model needs; a quantized model keeps the
numbers of its formats there. Constants, learning-rate schedule and seed are arguments of the
programs, so every precision, budget, rate and seed of a shape runs through the same three.

A step is a function of (state, batch) alone: the noise of stochastic rounding comes from the
state's seed and step number. Accumulation splits a batch into parts that follow one another and
averages their gradients; a part holds every A-th sequence, so that each device's share of the
batch gives a share of every part. What a quantizer scales by is then the part's, not the batch's.

On a mesh with the axis `run` the programs are of many runs at once, lanes: all they take and give
is stacked along a first axis, as many as there are lanes.

Shapes: B sequences, A parts, T tokens, S = T + 1 tokens of a record, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

from qat.training.processes import RowsByStep, place
from qat.training.schedule import Schedule, learning_rate
from qat.training.sharding import (
    BATCH,
    RUN,
    LogicalAxes,
    constrain,
    of_lanes,
    on_mesh,
    state_shardings,
)

Params = Any
Constants = Any


@dataclasses.dataclass(frozen=True)
class Task:
    """What training asks of a model.

    Attributes:
        init: (random key) → parameters, a nested dict of float32 arrays.
        apply: (parameters, constants, random key, tokens_BT) → logits_BTV, float32.
        axes: logical axes of the parameters, for `qat.training.sharding`.
        penalized: (parameters, constants, random key, tokens_BT) → (logits_BTV, penalty), as
            training runs it where something is to be small beside the loss, in nats per token;
            None is `apply`, and no penalty. No task is evaluated by it.
        losses: (parameters, constants, random key, tokens_BS) → losses_BT, what training lessens,
            nats per token; None is the cross entropy with the text, by which any task is evaluated,
            and the penalty.
        placement: (mesh) → shardings of the constants; None has them whole on every device.
    """

    init: Callable[[Array], Params]
    apply: Callable[[Params, Constants, Array, Array], Array]
    axes: LogicalAxes
    penalized: Callable[[Params, Constants, Array, Array], tuple[Array, Array]] | None = None
    losses: Callable[[Params, Constants, Array, Array], Array] | None = None
    placement: Callable[[Mesh], Any] | None = None

    def logits_and_penalty(
        self, params: Params, constants: Constants, key: Array, tokens_BT: Array
    ) -> tuple[Array, Array | float]:
        """As training runs it."""
        if self.penalized is None:
            return self.apply(params, constants, key, tokens_BT), 0.0
        return self.penalized(params, constants, key, tokens_BT)


class TrainState(NamedTuple):
    """All that training changes, and all that a checkpoint holds."""

    params: Params
    opt_state: Any
    step: Int[Array, ""]
    seed: UInt32[Array, ""]


class Metrics(NamedTuple):
    """What a train step reports, all float32 scalars of its batch."""

    loss: Float[Array, ""]  # nats per token, with the penalty if there is one
    grad_norm: Float[Array, ""]  # before clipping
    learning_rate: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Programs:
    """Jitted functions that share one shape; each compiles at its first call.

    Those of a mesh with the axis `run` are of lanes: every argument and result has one more axis
    in front.

    Attributes:
        init_state: (seed) → state.
        train_step: (state, constants, schedule, tokens_BS) → (state, metrics); consumes `state`.
        eval_step: (params, constants, tokens_BS) → mean loss of each sequence, nats per token.
        batch_sharding: placement of tokens.
        state_sharding: placement of the state.
        constants_sharding: placement of the constants, of all or of parts of their tree.
    """

    init_state: Callable[[Any], TrainState]
    train_step: Callable[[TrainState, Constants, Schedule, Any], tuple[TrainState, Metrics]]
    eval_step: Callable[[Params, Constants, Any], Float[Array, " B"]]
    batch_sharding: NamedSharding
    state_sharding: TrainState
    constants_sharding: Any


def make_programs(
    task: Task, optimizer: optax.GradientTransformation, mesh: Mesh, accumulation: int = 1
) -> Programs:
    """Places the state on the mesh and jits the three functions.

    Args:
        task: the model.
        optimizer: gives updates without their learning rate.
        mesh: devices.
        accumulation: parts A of a batch whose gradients are averaged one after another.

    Raises:
        ValueError: the state does not fit the mesh (see `state_shardings`).
    """
    losses = task.losses or functools.partial(_training_losses, task)

    def init_state(seed: Array) -> TrainState:
        params = task.init(jax.random.key(seed))
        seed = jnp.asarray(seed, jnp.uint32)
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), seed)

    def train_step(
        state: TrainState, constants: Constants, schedule: Schedule, tokens_BS: Array
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)

        def mean_loss(params: Params, key: Array, tokens_BS: Array) -> Array:
            return jnp.mean(losses(params, constants, key, tokens_BS))

        value_and_grad = _accumulated(jax.value_and_grad(mean_loss), accumulation)
        loss, grads = value_and_grad(state.params, key, tokens_BS)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        rate = learning_rate(schedule, state.step)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        metrics = Metrics(loss, optax.tree.norm(grads), rate)
        return TrainState(params, opt_state, state.step + 1, state.seed), metrics

    def eval_step(params: Params, constants: Constants, tokens_BS: Array) -> Array:
        key = jax.random.key(0)
        return jnp.mean(token_losses(task, params, constants, key, tokens_BS), axis=1)

    abstract = jax.eval_shape(init_state, jnp.uint32(0))
    placed = state_shardings(abstract, mesh, task.axes)
    batch = NamedSharding(mesh, BATCH)
    same = NamedSharding(mesh, PartitionSpec())
    constants = same if task.placement is None else task.placement(mesh)
    functions: tuple[Callable[..., Any], ...] = (init_state, train_step, eval_step)
    if RUN in mesh.shape:
        placed, batch = of_lanes((placed, batch))
        functions = _stacked(*functions)
    init, step, evaluation = functions
    return Programs(
        init_state=jax.jit(init, out_shardings=placed),
        train_step=jax.jit(
            on_mesh(mesh, step),
            in_shardings=(placed, constants, same, batch),
            out_shardings=(placed, same),
            donate_argnums=0,
        ),
        eval_step=jax.jit(
            on_mesh(mesh, evaluation),
            in_shardings=(placed.params, constants, batch),
            out_shardings=same,
        ),
        batch_sharding=batch,
        state_sharding=placed,
        constants_sharding=constants,
    )


def _stacked(
    init_state: Callable[..., Any], train_step: Callable[..., Any], eval_step: Callable[..., Any]
) -> tuple[Callable[..., Any], ...]:
    """The three functions of stacks.

    Lanes are initialised one after another: mapped random numbers take XLA on CPU six times as
    long to compile.
    """
    return (
        lambda seeds_L: jax.lax.map(init_state, seeds_L),
        jax.vmap(train_step, spmd_axis_name=RUN),
        jax.vmap(eval_step, spmd_axis_name=RUN),
    )


def _accumulated(
    value_and_grad: Callable[[Params, Array, Array], tuple[Array, Params]], parts: int
) -> Callable[[Params, Array, Array], tuple[Array, Params]]:
    """The mean over parts of a batch, computed one after another."""
    if parts == 1:
        return value_and_grad

    def accumulate(params: Params, key: Array, tokens_BS: Array) -> tuple[Array, Params]:
        batch, window = tokens_BS.shape
        tokens_BAS = tokens_BS.reshape(batch // parts, parts, window)

        def add(total: Any, part: Array) -> tuple[Any, None]:
            tokens_BS = constrain(tokens_BAS[:, part], "batch", None)
            found = value_and_grad(params, jax.random.fold_in(key, part), tokens_BS)
            return jax.tree.map(jnp.add, total, found), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add, zero, jnp.arange(parts))
        mean: tuple[Array, Params] = jax.tree.map(lambda leaf: leaf / parts, total)
        return mean

    return accumulate


def _training_losses(
    task: Task, params: Params, constants: Constants, key: Array, tokens_BS: Array
) -> Array:
    """What training lessens, for every token."""
    logits_BTV, penalty = task.logits_and_penalty(params, constants, key, tokens_BS[:, :-1])
    return cross_entropy(logits_BTV, tokens_BS) + penalty


def token_losses(
    task: Task, params: Params, constants: Constants, key: Array, tokens_BS: Int[Array, "B S"]
) -> Float[Array, "B T"]:
    """Cross entropy of every token but the first of each record, in nats."""
    return cross_entropy(task.apply(params, constants, key, tokens_BS[:, :-1]), tokens_BS)


def cross_entropy(
    logits_BTV: Float[Array, "B T V"], tokens_BS: Int[Array, "B S"]
) -> Float[Array, "B T"]:
    """Of every token but the first of each record, in nats.

    The target's logit is picked by a mask that fuses into the sum, so that the backward pass keeps
    the logits in the head's own dtype, and neither float32 log probabilities nor a scatter.
    """
    targets_BT1 = tokens_BS[:, 1:, None].astype(jnp.int32)
    ids_11V = jnp.arange(logits_BTV.shape[-1], dtype=jnp.int32)[None, None, :]
    target_logit_BT = jnp.sum(jnp.where(targets_BT1 == ids_11V, logits_BTV, 0.0), axis=-1)
    return jax.nn.logsumexp(logits_BTV, axis=-1) - target_logit_BT


def evaluate(
    programs: Programs, params: Params, constants: Constants, batches: RowsByStep
) -> Float[np.ndarray, " R"]:
    """Mean loss of each of R sequences, nats per token, float64; to be averaged or paired."""
    losses = [
        programs.eval_step(params, constants, place(batches, step, programs.batch_sharding))
        for step in range(len(batches))
    ]
    return np.concatenate([np.asarray(loss, np.float64) for loss in losses])
