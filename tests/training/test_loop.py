"""The loop: what it reports and when, how it stops, and that going on changes no bit."""

import dataclasses

import jax
import numpy as np
import pytest

from qat.training import curve
from qat.training.checkpoint import Checkpoints
from qat.training.processes import PreemptedError
from qat.training.schedule import branches
from qat.training.sharding import make_mesh
from tests.training_checks import abstract, assert_same, programs_on, run


@pytest.fixture(scope="module")
def whole(programs):
    return run(programs, "w4a8")


def going_on(programs, folder, **options):
    """A run in a folder, as a program has it: restore, rewind, append."""
    path = folder / "curve.csv"
    with Checkpoints(folder / "checkpoints", {}) as checkpoints:
        state = checkpoints.restore(abstract(programs), programs.state_sharding)
        curve.rewind(path, 0 if state is None else int(state.step))
        return run(
            programs,
            "w4a8",
            state=state,
            checkpoints=checkpoints,
            **{"on_log": lambda step, metrics: curve.append(path, step, metrics), **options},
        )


def test_every_step_is_reported_once_in_order(programs, whole):
    calls = []
    run(programs, "w4a8", log_every=4, on_log=lambda step, metrics: calls.append((step, metrics)))
    steps = [step for step, _ in calls]
    assert steps == sorted(set(steps))
    assert [step for step, metrics in calls for _ in metrics] == [
        step for before, step in zip([0, *steps], steps, strict=False) for _ in range(step - before)
    ]
    assert steps[-1] == 30
    assert [metrics.loss for _, each in calls for metrics in each] == [*whole.losses.values()]
    first = calls[0][1][0]
    assert {type(number) for number in first} <= {np.ndarray, np.float32}
    assert float(first.grad_norm) > 0


def test_a_reading_leaves_the_newest_step_to_the_device(programs):
    steps = []
    run(programs, steps=30, on_log=lambda step, metrics: steps.append(step))
    assert steps == [9, 19, 30]


def test_an_interrupted_run_that_goes_on_equals_the_uninterrupted_one(programs, whole, tmp_path):
    def stop(step, metrics):
        if step > 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        going_on(programs, tmp_path, checkpoint_every=15, on_log=stop)
    resumed = going_on(programs, tmp_path)
    assert_same(resumed.state, whole.state)
    assert resumed.losses == {step: whole.losses[step] for step in range(16, 31)}


def test_what_is_saved_while_training_goes_on_is_the_state_of_that_step(programs, tmp_path):
    expected = run(programs, "w4a8", stop=7).state
    with Checkpoints(tmp_path, {}, keep=9) as checkpoints:
        run(programs, "w4a8", checkpoints=checkpoints, checkpoint_every=7)
    with Checkpoints(tmp_path, {}, keep=9) as checkpoints:
        for step in (30, 28, 21, 14):
            (tmp_path / str(step)).rename(tmp_path / f"aside{step}")
        assert_same(checkpoints.restore(abstract(programs), programs.state_sharding), expected)


def test_a_preempted_run_is_saved_and_goes_on_to_the_same_bits(programs, whole, tmp_path):
    asked = iter([False] * 12 + [True])
    with pytest.raises(PreemptedError, match="after 12 of 30 steps"):
        going_on(programs, tmp_path, preempted=lambda: next(asked))
    assert max(curve.read(tmp_path / "curve.csv")) == 12
    assert (tmp_path / "checkpoints" / "12").is_dir()
    resumed = going_on(programs, tmp_path)
    assert_same(resumed.state, whole.state)
    assert [metrics.loss for metrics in curve.read(tmp_path / "curve.csv").values()] == [
        *whole.losses.values()
    ]


def test_a_run_preempted_before_its_first_step_saves_nothing(programs, tmp_path):
    with pytest.raises(PreemptedError, match="after 0 of 30 steps"):
        going_on(programs, tmp_path, preempted=lambda: True)
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "tolerance"),
    # A rounding that flips changes all that follows by up to 1e-2; at this rate none flips.
    [("none", 1e-5), ("w4a8kv4", 1e-4)],
)
def test_a_run_goes_on_with_fewer_devices(programs, fewer, tmp_path, policy, tolerance):
    losses = {}
    for on, stop in zip((*fewer, programs), (4, 7, 10), strict=True):
        with Checkpoints(tmp_path, {}) as checkpoints:
            state = checkpoints.restore(abstract(on), on.state_sharding)
            options = {"state": state, "stop": stop, "checkpoints": checkpoints}
            losses.update(run(on, policy, peak=1e-3, **options).losses)
    expected = run(programs, policy, peak=1e-3, stop=10).losses
    assert list(losses) == list(expected)
    np.testing.assert_allclose([*losses.values()], [*expected.values()], rtol=tolerance)


@pytest.fixture(scope="module")
def fewer():
    """Programs for eight devices, then for two."""
    return [programs_on(make_mesh(devices=jax.devices()[:count])) for count in (8, 2)]


def test_a_state_beyond_the_stop_is_refused(programs):
    state = run(programs, stop=3).state
    with pytest.raises(ValueError, match="at step 3: expected at most 2"):
        run(programs, state=state, stop=2)


def test_a_diverging_run_ends_with_its_first_loss_that_is_not_finite(programs, tmp_path):
    result = going_on(programs, tmp_path, peak=1e30, log_every=5, checkpoint_every=10)
    assert result.status == "diverged"
    *finite, last = result.losses.values()
    assert np.isfinite(finite).all()
    assert not np.isfinite(last)
    assert max(curve.read(tmp_path / "curve.csv")) == len(result.losses) < 30
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert all(step < len(result.losses) for step in saved)


def test_a_loss_above_the_limit_has_diverged(programs, whole):
    limit = sorted(whole.losses.values())[-3]
    result = run(programs, "w4a8", loss_limit=limit, log_every=7)
    assert result.status == "diverged"
    *below, last = result.losses.values()
    assert max(below, default=limit) <= limit < last


def test_a_branch_equals_a_run_of_its_budget_alone(programs, tmp_path):
    short, trunk = branches(1e-2, [20, 30], warmup_fraction=0.2)
    alone = dataclasses.replace(short)
    expected = run(programs, "w4", schedule=alone)
    whole_trunk = run(programs, "w4", schedule=trunk)
    with Checkpoints(tmp_path, {}) as checkpoints:
        options = {"schedule": trunk, "stop": short.cooldown_start, "checkpoints": checkpoints}
        begun = run(programs, "w4", **options)
        branch = run(programs, "w4", schedule=short, state=begun.state)
        back = checkpoints.restore(abstract(programs), programs.state_sharding)
        finished = run(programs, "w4", schedule=trunk, state=back)
    assert_same(branch.state, expected.state)
    assert_same(finished.state, whole_trunk.state)
    assert int(jax.device_get(branch.state.step)) == 20
    assert branch.losses[20] != whole_trunk.losses[20]
