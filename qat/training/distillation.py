"""A student that learns a teacher's soft labels instead of the text's own tokens.

The loss of a token is the cross entropy of the student's distribution with the teacher's, as in
LLM-QAT (Liu et al., arXiv 2305.17888): no hard labels, no temperature, nothing from inside the
layers. It is least, the teacher's own entropy, where both agree, and its gradient is that of their
KL divergence. So it says what the teacher knows at every position, which text the teacher wrote
itself can teach as well as real text.

A student is a task like any other: the same loop, checkpoints and sweeps train it. Its teacher is
data, part of the constants, and lies on the mesh as the student's parameters do. What a student is
evaluated by stays the cross entropy with real text. What else its training is to keep small, as the
imbalance of its experts, it keeps small here too.

Shapes: B sequences, T tokens, S = T + 1 tokens of a record, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from qat.training.sharding import state_shardings
from qat.training.step import Constants, Params, Task


class Taught(NamedTuple):
    """The constants of a student.

    Attributes:
        own: as the student alone would have them.
        teacher_params: of the teacher.
        teacher: the teacher's constants.
    """

    own: Constants
    teacher_params: Params
    teacher: Constants


def taught(student: Task, teacher: Task) -> Task:
    """The task of a student, whose constants are `Taught`.

    Args:
        student: what is trained.
        teacher: what it learns from; reads the same token ids and has the same vocabulary.
    """

    def apply(params: Params, constants: Taught, key: Array, tokens_BT: Array) -> Array:
        return student.apply(params, constants.own, key, tokens_BT)

    def losses(params: Params, constants: Taught, key: Array, tokens_BS: Array) -> Array:
        tokens_BT = tokens_BS[:, :-1]
        known_BTV = teacher.apply(constants.teacher_params, constants.teacher, key, tokens_BT)
        logits_BTV, penalty = student.logits_and_penalty(params, constants.own, key, tokens_BT)
        return soft_cross_entropy(logits_BTV, known_BTV) + penalty

    def placement(mesh: Mesh) -> Any:
        same = NamedSharding(mesh, PartitionSpec())
        params = jax.eval_shape(teacher.init, jax.random.key(0))
        return Taught(same, state_shardings(params, mesh, teacher.axes), same)

    return Task(student.init, apply, student.axes, losses=losses, placement=placement)


def soft_cross_entropy(
    logits_BTV: Float[Array, "B T V"], teacher_BTV: Float[Array, "B T V"]
) -> Float[Array, "B T"]:
    """Cross entropy with the distribution of a teacher's logits, in nats; both float32.

    No gradient passes to the teacher.
    """
    probabilities_BTV = jax.lax.stop_gradient(jax.nn.softmax(teacher_BTV))
    expected_BT = jnp.sum(probabilities_BTV * logits_BTV, axis=-1)
    return jax.nn.logsumexp(logits_BTV, axis=-1) - expected_BT
