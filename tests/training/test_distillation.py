"""Soft labels against float64 NumPy, and a student that learns them, on one device and on eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.task import constants_for, language_model
from qat.policy import Policy
from qat.training.distillation import Taught, soft_cross_entropy, taught
from qat.training.loop import train
from qat.training.optimizer import adamw
from qat.training.schedule import warmup_cosine
from qat.training.sharding import make_mesh
from qat.training.step import evaluate, make_programs
from tests.training_checks import BATCHES, CONFIG, STRUCTURE, Walks, constants, run

W2 = Policy.parse("w2")


def logits(seed):
    return jnp.asarray(3 * np.random.default_rng(seed).standard_normal((2, 3, 7)), jnp.float32)


def softmax(x):
    exponentials = np.exp(np.asarray(x, np.float64))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def test_the_loss_is_the_cross_entropy_of_two_distributions():
    student, teacher = logits(0), logits(1)
    expected_BT = -(softmax(teacher) * np.log(softmax(student))).sum(axis=-1)
    np.testing.assert_allclose(soft_cross_entropy(student, teacher), expected_BT, rtol=1e-5)


def test_its_gradient_is_the_difference_of_the_distributions_and_none_for_the_teacher():
    student, teacher = logits(0), logits(1)
    by_student, by_teacher = jax.grad(lambda s, t: soft_cross_entropy(s, t).sum(), argnums=(0, 1))(
        student, teacher
    )
    np.testing.assert_allclose(by_student, softmax(student) - softmax(teacher), atol=1e-6)
    np.testing.assert_array_equal(by_teacher, 0)


@pytest.fixture(scope="module")
def teacher(programs):
    """Parameters that have learned the walks, on the host."""
    return jax.device_get(run(programs, steps=150).state.params)


def student_programs(mesh):
    task = taught(language_model(CONFIG, STRUCTURE), language_model(CONFIG, None))
    return make_programs(task, adamw(weight_decay=0.0), mesh)


@pytest.fixture(scope="module")
def alone():
    return student_programs(make_mesh(devices=jax.devices()[:1]))


def taught_by(programs, teacher, policy):
    params = jax.device_put(teacher, programs.constants_sharding.teacher_params)
    return Taught(constants_for(CONFIG, policy), params, constants_for(CONFIG, None))


def distilled(programs, teacher, policy, steps, start=None):
    """A student that begins like its teacher, if not elsewhere."""
    state = programs.init_state(np.uint32(0))
    start = jax.device_get(teacher if start is None else start)
    own = jax.tree.map(jnp.array, jax.device_put(start, programs.state_sharding.params))
    return train(
        programs,
        state._replace(params=own),
        taught_by(programs, teacher, policy),
        warmup_cosine(3e-3, steps),
        BATCHES,
        log_every=10,
    )


@pytest.mark.slow
def test_a_student_of_two_bits_learns_and_is_better_than_its_rounded_teacher(alone, teacher):
    result = distilled(alone, teacher, W2, steps=120)
    losses = list(result.losses.values())
    assert np.mean(losses[-10:]) < np.mean(losses[:3]) - 0.1
    numbers = taught_by(alone, teacher, W2)
    student = evaluate(alone, result.state.params, numbers, Walks(4)).mean()
    rounded = evaluate(alone, teacher, numbers, Walks(4)).mean()
    exact = evaluate(alone, teacher, taught_by(alone, teacher, Policy.parse("none")), Walks(4))
    assert exact.mean() < student < rounded - 0.1


def test_a_student_is_evaluated_on_the_text_as_any_task(alone, programs, teacher):
    as_student = evaluate(alone, teacher, taught_by(alone, teacher, W2), Walks(2))
    as_model = evaluate(programs, teacher, constants("w2"), Walks(2))
    np.testing.assert_allclose(as_student, as_model, rtol=1e-6)


def test_the_loss_of_a_student_like_its_teacher_is_the_teacher_s_entropy(alone, teacher):
    exact = Policy.parse("none")
    result = distilled(alone, teacher, exact, steps=1)
    tokens_BT = jnp.asarray(BATCHES.batch_at(0)[:, :-1])
    task, numbers = language_model(CONFIG, STRUCTURE), constants_for(CONFIG, exact)
    known = softmax(task.apply(teacher, numbers, jax.random.key(0), tokens_BT))
    entropy = -(known * np.log(known)).sum(axis=-1).mean()
    assert result.losses[1] == pytest.approx(entropy, rel=1e-5)


def test_a_student_keeps_what_its_training_is_to_keep_small():
    task, numbers = language_model(CONFIG, STRUCTURE), constants()
    params, tokens_BS = task.init(jax.random.key(0)), jnp.asarray(BATCHES.batch_at(0))
    penalized = dataclasses.replace(
        task, penalized=lambda *inputs: (task.apply(*inputs), jnp.float32(0.5))
    )
    inputs = params, Taught(numbers, params, numbers), jax.random.key(0), tokens_BS
    plain, more = (taught(each, task).losses(*inputs) for each in (task, penalized))
    np.testing.assert_allclose(more, plain + 0.5, rtol=1e-6)


def test_a_teacher_lies_on_the_mesh_as_its_student_and_changes_no_loss(alone, teacher):
    sharded = student_programs(make_mesh(2, 2, 2))
    place = taught_by(sharded, teacher, W2).teacher_params["head"]["kernel"].sharding
    assert not place.is_fully_replicated
    exact, fresh = Policy.parse("none"), alone.init_state(np.uint32(1)).params
    expected = distilled(alone, teacher, exact, steps=5, start=fresh).losses
    found = distilled(sharded, teacher, exact, steps=5, start=fresh).losses
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-4)
