"""Whole runs: golden losses, restore, meshes, divergence, one program for all precisions."""

import collections
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.task import constants_for, language_model
from models.transformer import TransformerConfig
from qat.policy import Policy
from qat.quantizer import Quantizer
from qat.training.checkpoint import Checkpoints, claim
from qat.training.loop import train
from qat.training.optimizer import adamw
from qat.training.schedule import warmup_cosine
from qat.training.sharding import make_mesh
from qat.training.step import evaluate, make_programs, mean_and_standard_error

CONFIG = TransformerConfig(vocabulary=32, width=16, layers=2, heads=4, kv_heads=2)
STRUCTURE = Policy.parse("none")


def batch_at(step):
    """A noisy walk over the vocabulary: predictable enough to learn in 30 steps."""
    rng = np.random.default_rng(step)
    start_B1 = rng.integers(0, 32, (8, 1))
    walk_BS = start_B1 + np.cumsum(rng.integers(1, 3, (8, 17)), axis=1)
    return (walk_BS % 32).astype(np.int32)


BATCHES = types.SimpleNamespace(batch_at=batch_at)


def programs_on(mesh, **options):
    return make_programs(language_model(CONFIG, STRUCTURE), adamw(), mesh, **options)


@pytest.fixture(scope="module")
def programs():
    return programs_on(make_mesh(devices=jax.devices()[:1]))


def run(programs, policy="none", steps=30, peak=1e-2, seed=0, **options):
    return train(
        programs,
        programs.init_state(jnp.uint32(seed)),
        constants_for(CONFIG, Policy.parse(policy)),
        warmup_cosine(peak, steps),
        BATCHES,
        **{"log_every": 10, **options},
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
    result = run(programs, policy, log_every=1)
    assert result.status == "ok"
    for step, loss, tolerance in zip((1, 5, 30), golden, (1e-4, 2e-3, last_tolerance), strict=True):
        assert result.losses[step] == pytest.approx(loss, rel=tolerance)


def test_every_precision_budget_rate_and_seed_runs_through_one_program(programs):
    compiled = collections.Counter()

    def listen(event, duration_secs, **details):
        if event.endswith("backend_compile_duration"):
            compiled[details.get("fun_name")] += 1

    run(programs, steps=2)
    evaluate(programs, programs.init_state(jnp.uint32(0)).params, constants(), [batch_at(0)])
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for policy in ("none", "w2", "a3", "kv4", "we4m3ae5m2", "wternarya8", "w4a4kv4"):
            result = run(programs, policy, steps=3, peak=2e-3, seed=1)
            evaluate(programs, result.state.params, constants(policy), [batch_at(0)])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled["jit(train_step)"] == compiled["jit(eval_step)"] == 0


def constants(policy="none"):
    return constants_for(CONFIG, Policy.parse(policy))


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


@pytest.mark.parametrize(("policy", "tolerance"), [("none", 1e-5), ("w4a8kv4", 1e-2)])
def test_sharding_does_not_change_the_losses(programs, policy, tolerance):
    single = run(programs, policy).losses
    sharded = run(programs_on(make_mesh(2, 2, 2)), policy).losses
    np.testing.assert_allclose(list(sharded.values()), list(single.values()), rtol=tolerance)


def test_accumulation_does_not_change_the_losses(programs):
    parts = programs_on(make_mesh(devices=jax.devices()[:1]), accumulation=4)
    for policy, tolerance in (("none", 1e-5), ("w4", 1e-4)):  # scales of weights know no batch
        whole, split = run(programs, policy).losses, run(parts, policy).losses
        np.testing.assert_allclose(list(split.values()), list(whole.values()), rtol=tolerance)


def test_accumulation_on_a_mesh_splits_every_device_s_share(programs):
    parts = programs_on(make_mesh(2, 1, 1, jax.devices()[:2]), accumulation=4)
    whole, split = run(programs).losses, run(parts).losses
    np.testing.assert_allclose(list(split.values()), list(whole.values()), rtol=1e-5)


def test_stochastic_rounding_is_a_function_of_seed_and_step():
    rounding = Quantizer("int8", "token", rounding="stochastic")
    policy = dataclasses.replace(Policy.parse("w4a8"), gradients=rounding)
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


def test_a_restored_run_equals_the_uninterrupted_one(programs, tmp_path):
    whole = run(programs, "w4a8")
    schedule = warmup_cosine(1e-2, 30)
    checkpoints = Checkpoints(tmp_path, "config")

    def stop(step, metrics):
        if step == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(programs, "w4a8", checkpoints=checkpoints, checkpoint_every=15, on_log=stop)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, "config")
    abstract = jax.eval_shape(programs.init_state, jnp.uint32(0))
    state = checkpoints.restore(abstract, programs.state_sharding)
    assert int(state.step) == 15
    resumed = train(
        programs, state, constants("w4a8"), schedule, BATCHES, log_every=10, checkpoints=checkpoints
    )
    checkpoints.close()
    assert_same(resumed.state, whole.state)
    assert resumed.losses == {step: whole.losses[step] for step in (20, 30)}


def test_a_checkpoint_restores_onto_another_mesh(programs, tmp_path):
    state = run(programs, steps=2).state
    checkpoints = Checkpoints(tmp_path, "config")
    checkpoints.save(state)
    sharded = programs_on(make_mesh(2, 2, 2))
    abstract = jax.eval_shape(sharded.init_state, jnp.uint32(0))
    restored = checkpoints.restore(abstract, sharded.state_sharding)
    checkpoints.close()
    assert_same(restored, state)
    assert len(restored.params["head"]["kernel"].sharding.device_set) == 8


def test_a_checkpoint_of_another_configuration_is_refused(programs, tmp_path):
    checkpoints = Checkpoints(tmp_path, "mine")
    checkpoints.save(run(programs, steps=1).state)
    checkpoints.close()
    other = Checkpoints(tmp_path, "other")
    abstract = jax.eval_shape(programs.init_state, jnp.uint32(0))
    with pytest.raises(ValueError, match="belongs to configuration mine, expected other"):
        other.restore(abstract, programs.state_sharding)
    other.close()


def test_a_diverging_run_ends_as_diverged(programs):
    result = run(programs, "w4a8", steps=30, peak=1e30, log_every=5)
    assert result.status == "diverged"
    assert max(result.losses) < 30


def test_evaluation_is_the_mean_cross_entropy_of_each_sequence(programs):
    params = programs.init_state(jnp.uint32(0)).params
    losses_R = evaluate(programs, params, constants(), [batch_at(0), batch_at(1)])
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


def test_standard_error_is_that_of_the_mean():
    losses = np.random.default_rng(0).normal(size=400)
    mean, error = mean_and_standard_error(losses)
    assert mean == losses.mean()
    assert error == pytest.approx(losses.std(ddof=1) / 20)


def test_a_workdir_belongs_to_one_configuration(tmp_path):
    workdir = tmp_path / "a"
    claim(workdir, {"policy": "w4", "seed": 0})
    claim(workdir, {"seed": 0, "policy": "w4"})
    with pytest.raises(ValueError, match="policy is 'w4' there, 'w3' here"):
        claim(workdir, {"policy": "w3", "seed": 0})


def test_a_workdir_names_the_nested_setting_that_differs(tmp_path):
    claim(tmp_path / "a", {"model": {"width": 8, "layers": 2}})
    with pytest.raises(ValueError, match=r"\(model\.width is 8 there, 16 here\)"):
        claim(tmp_path / "a", {"model": {"width": 16, "layers": 2}})


def test_a_workdir_whose_claim_was_killed_is_free(tmp_path):
    (tmp_path / "config.json.123.partial").write_text("{")
    claim(tmp_path, {"seed": 0})
    claim(tmp_path, {"seed": 0})
    with pytest.raises(ValueError, match="seed is 0 there, 1 here"):
        claim(tmp_path, {"seed": 1})


def test_a_damaged_marker_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        claim(tmp_path, {"seed": 0})
    assert (tmp_path / "config.json").read_text() == "{"


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="not empty and no run made it"):
        claim(tmp_path, {"seed": 0})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def assert_same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
