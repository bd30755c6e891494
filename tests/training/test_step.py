"""Steps of whole runs: golden losses, meshes, accumulation, one program for all precisions."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.task import constants_for, language_model
from qat.policy import Policy
from qat.quantizer import Quantizer
from qat.training.loop import train
from qat.training.optimizer import adamw
from qat.training.processes import place
from qat.training.schedule import warmup_cosine
from qat.training.sharding import make_mesh
from qat.training.step import evaluate, make_programs
from tests.training_checks import (
    BATCHES,
    CONFIG,
    STRUCTURE,
    Walks,
    assert_same,
    batch_at,
    constants,
    programs_on,
    programs_on_one_device,
    run,
)


@pytest.mark.parametrize(
    ("policy", "golden", "last_tolerance"),
    [
        ("none", (3.8187, 3.3980, 2.4421), 1e-3),
        # A flipped rounding amplifies the last bit, so another CPU may end a little elsewhere.
        ("w4a8kv4", (3.8032, 3.4704, 2.5312), 3e-2),
        ("we2m1ae4m3", (3.8034, 3.4864, 2.5007), 3e-2),
    ],
)
def test_losses_are_the_golden_ones(programs, policy, golden, last_tolerance):
    result = run(programs, policy)
    assert result.status == "ok"
    for step, loss, tolerance in zip((1, 5, 30), golden, (1e-4, 2e-3, last_tolerance), strict=True):
        assert result.losses[step] == pytest.approx(loss, rel=tolerance)


def test_every_precision_budget_rate_and_seed_runs_through_one_program(programs):
    compiled = collections.Counter()

    def listen(event, duration_secs, **details):
        if event.endswith("backend_compile_duration"):
            compiled[details.get("fun_name")] += 1

    run(programs, steps=2)
    evaluate(programs, programs.init_state(jnp.uint32(0)).params, constants(), Walks(1))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for policy in ("none", "w2", "a3", "kv4", "we4m3ae5m2", "wternarya8", "w4a4kv4"):
            result = run(programs, policy, steps=3, peak=2e-3, seed=1)
            evaluate(programs, result.state.params, constants(policy), Walks(1))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled["jit(train_step)"] == compiled["jit(eval_step)"] == 0


def test_the_none_policy_trains_like_a_model_without_any_policy(programs):
    mesh = make_mesh(devices=jax.devices()[:1])
    plain = make_programs(language_model(CONFIG, None), adamw(), mesh)
    result = train(
        plain,
        plain.init_state(jnp.uint32(0)),
        constants_for(CONFIG, None),
        warmup_cosine(1e-2, 30),
        BATCHES,
        log_every=10,
    )
    assert result.losses == run(programs).losses
    assert_same(result.state, run(programs).state)


@pytest.fixture(scope="module")
def sharded():
    return programs_on(make_mesh(2, 2, 2))


def test_sharding_does_not_change_the_losses(programs, sharded):
    single, split = run(programs).losses, run(sharded).losses
    np.testing.assert_allclose(list(split.values()), list(single.values()), rtol=1e-5)


@pytest.mark.parametrize("policy", ["none", "w8a8", "w4a8kv4", "we4m3ae4m3"])
def test_sharding_does_not_change_a_step(programs, sharded, policy):
    """From the same state: over many steps, one rounding that flips changes all that follow."""
    numbers, schedule = constants(policy), warmup_cosine(1e-2, 30)
    state = programs.init_state(jnp.uint32(0))
    for step in range(10):
        copy = jax.device_put(jax.device_get(state), sharded.state_sharding)
        batch = place(BATCHES, step, sharded.batch_sharding)
        _, split = sharded.train_step(copy, numbers, schedule, batch)
        batch = place(BATCHES, step, programs.batch_sharding)
        state, single = programs.train_step(state, numbers, schedule, batch)
        tolerance = 1e-5 if policy == "none" else 1e-4
        np.testing.assert_allclose(split.loss, single.loss, rtol=tolerance)


def test_accumulation_does_not_change_the_losses(programs):
    parts = programs_on_one_device(accumulation=4)
    for policy, tolerance in (("none", 1e-5), ("w4", 1e-4)):  # scales of weights know no batch
        whole, split = run(programs, policy).losses, run(parts, policy).losses
        np.testing.assert_allclose(list(split.values()), list(whole.values()), rtol=tolerance)


def test_accumulation_on_a_mesh_splits_every_device_s_share(programs):
    parts = programs_on(make_mesh(2, 1, 1, jax.devices()[:2]), accumulation=4)
    state = jax.device_put(programs.init_state(np.uint32(0)), parts.state_sharding)
    whole, split = run(programs).losses, run(parts, state=state).losses
    np.testing.assert_allclose(list(split.values()), list(whole.values()), rtol=1e-5)


@pytest.mark.parametrize("mode", ["fake", "native"])
def test_stochastic_rounding_is_a_function_of_seed_and_step(mode):
    rounding = Quantizer("int8", "token", rounding="stochastic")
    policy = dataclasses.replace(Policy.parse("w8a8"), gradients=rounding, mode=mode)
    task = language_model(CONFIG, policy)
    programs = make_programs(task, adamw(), make_mesh(devices=jax.devices()[:1]))
    constants, schedule = constants_for(CONFIG, policy), warmup_cosine(1e-2, 10)

    def losses(seed, noise):
        state = programs.init_state(jnp.uint32(seed))._replace(seed=jnp.uint32(noise))
        result = train(programs, state, constants, schedule, BATCHES, log_every=1)
        return list(result.losses.values())

    first = losses(0, 0)
    assert losses(0, 0) == first
    other = losses(0, 1)
    assert other[0] == first[0]  # noise is in the gradients alone
    assert other[1:] != first[1:]


def test_evaluation_is_the_mean_cross_entropy_of_each_sequence(programs):
    params = programs.init_state(jnp.uint32(0)).params
    losses_R = evaluate(programs, params, constants(), Walks(2))
    task = language_model(CONFIG, STRUCTURE)
    for row, batch in ((0, batch_at(0)), (8, batch_at(1))):
        logits_BTV = np.asarray(
            task.apply(params, constants(), jax.random.key(0), jnp.asarray(batch[:, :-1])),
            np.float64,
        )
        log_sum_BT = np.log(np.exp(logits_BTV).sum(axis=-1))
        chosen_BT = np.take_along_axis(logits_BTV, batch[:, 1:, None], axis=-1)[..., 0]
        expected_B = (log_sum_BT - chosen_BT).mean(axis=1)
        np.testing.assert_allclose(losses_R[row : row + 8], expected_B, rtol=1e-5)
