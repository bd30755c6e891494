"""Lanes against the same runs alone, on one device and spread over a mesh."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from models.task import constants_for
from qat.policy import Policy
from qat.training.lanes import begin, lane_of, place_lanes, spread, stack, train_lanes
from qat.training.loop import train
from qat.training.processes import PreemptedError, place
from qat.training.schedule import warmup_cosine
from qat.training.sharding import make_mesh
from tests.training_checks import CONFIG, assert_same, batch_at, constants, programs_on

STEPS = 12
SEEDS = (0, 0, 1, 2, 3, 4, 5, 6)
PEAKS = (1e-2, 3e-3, 1e-2, 2e-2, 1e-2, 1e-2, 1e-2, 1e-2)
SCHEDULES = [warmup_cosine(peak, STEPS) for peak in PEAKS]


@dataclasses.dataclass(frozen=True)
class Walks:
    """Batches of a run of their own."""

    seed: int
    shape = (8, 17)

    def batch_at(self, step, rows=slice(None)):
        return batch_at(1000 * self.seed + step)[rows]

    def __len__(self):
        return 1000


BATCHES = [Walks(seed) for seed in SEEDS]
MESHES = {"one": (1, 1), "eight": (8, 1), "pairs": (4, 2)}


@functools.cache
def programs_of(mesh):
    run, data = MESHES[mesh]
    return programs_on(make_mesh(data, run=run, devices=jax.devices()[: run * data]))


def whole_on(mesh):
    """Placement of what is not split, where programs of one run would have it."""
    run, data = MESHES[mesh]
    return NamedSharding(make_mesh(devices=jax.devices()[: run * data]), PartitionSpec())


def begun(mesh, seeds):
    """Lanes of the seeds, whose initial values are compiled for one mesh alone."""
    lanes = begin(programs_of("one"), seeds)
    state = jax.device_put(jax.device_get(lanes.state), programs_of(mesh).state_sharding)
    return dataclasses.replace(lanes, state=state)


@pytest.fixture
def on_one():
    return programs_of("one")


def together(programs, lanes=None, stop=STEPS, schedules=SCHEDULES, limit=math.inf, **options):
    """All lanes; also each one's losses by step."""
    losses = [{} for _ in SEEDS]

    def on_log(lane, step, metrics):
        first = step - len(metrics) + 1
        losses[lane].update({first + i: float(each.loss) for i, each in enumerate(metrics)})

    result = train_lanes(
        programs,
        lanes or begin(programs, SEEDS),
        stack([constants()] * len(SEEDS)),
        stack(schedules),
        BATCHES,
        stop=stop,
        loss_limit=limit,
        on_log=on_log,
        **{"log_every": 5, **options},
    )
    return result, losses


@pytest.fixture(scope="module")
def alone(programs):
    """Every run by itself, by index."""

    def train_alone(seed, schedule, batches):
        state = programs.init_state(np.uint32(seed))
        return train(programs, state, constants(), schedule, batches, log_every=5)

    return [train_alone(*each) for each in zip(SEEDS, SCHEDULES, BATCHES, strict=True)]


@pytest.mark.parametrize(
    "mesh",
    [mesh if mesh == "pairs" else pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES],
)
def test_every_lane_is_the_run_alone(mesh, alone):
    result, losses = together(programs_of(mesh), begun(mesh, SEEDS))
    whole = jax.tree.map(lambda _: whole_on(mesh), result.state)
    assert result.step == STEPS
    assert result.statuses == ("ok",) * 8
    for lane, single in enumerate(alone):
        assert list(losses[lane]) == list(single.losses) == list(range(1, STEPS + 1))
        np.testing.assert_allclose(
            list(losses[lane].values()), list(single.losses.values()), rtol=1e-5
        )
        state = lane_of(result.state, lane, whole)
        assert int(state.step) == STEPS
        assert int(state.seed) == SEEDS[lane]
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(single.state), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mesh", [pytest.param("one", marks=pytest.mark.slow), "pairs"])
def test_each_lane_has_a_precision_of_its_own(mesh, programs):
    lane_programs = programs_of(mesh)
    policies = ("none", "w4", "w2", "a3", "kv2", "w4a8kv4", "we2m1", "w3")
    numbers = [constants_for(CONFIG, Policy.parse(policy)) for policy in policies]
    batches = [BATCHES[0]] * 8
    tokens_LBS = place_lanes(batches, 0, lane_programs.batch_sharding)
    state = begun(mesh, [0] * 8).state
    schedules = stack([SCHEDULES[0]] * 8)
    _, metrics = lane_programs.train_step(state, stack(numbers), schedules, tokens_LBS)
    tokens_BS = place(BATCHES[0], 0, programs.batch_sharding)
    for lane, single in enumerate(numbers):
        state = programs.init_state(np.uint32(0))
        _, expected = programs.train_step(state, single, SCHEDULES[0], tokens_BS)
        np.testing.assert_allclose(metrics.loss[lane], expected.loss, rtol=1e-4)
    assert len(set(np.asarray(metrics.loss).tolist())) == 8


def test_what_is_spread_lies_where_it_trains():
    programs = programs_of("pairs")
    state = jax.eval_shape(programs.init_state, np.zeros(8, np.uint32))
    for leaf, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(programs.state_sharding), strict=True
    ):
        assert sharding.shard_shape(leaf.shape)[0] == 2
    assert programs.batch_sharding.shard_shape((8, 8, 17)) == (2, 4, 17)


def test_stretches_are_the_whole(on_one):
    whole, losses = together(on_one)
    half, first = together(on_one, stop=7)
    rest, second = together(on_one, half)
    assert [{**a, **b} for a, b in zip(first, second, strict=True)] == losses
    assert_same(rest.state, whole.state)


def test_a_lane_that_diverges_leaves_the_others_alone(on_one):
    healthy, expected = together(on_one)
    wild = [*SCHEDULES[:3], warmup_cosine(1e30, STEPS), *SCHEDULES[4:]]
    result, losses = together(on_one, schedules=wild, limit=10.0)
    assert result.statuses == ("ok",) * 3 + ("diverged",) + ("ok",) * 4
    *before, last = losses[3].values()
    assert 1 <= len(before) < STEPS - 1
    assert max(before) <= 10.0
    assert not last <= 10.0
    assert [*losses[:3], *losses[4:]] == [*expected[:3], *expected[4:]]
    for lane in (0, 7):
        assert_same(*(jax.tree.map(lambda x, i=lane: x[i], r.state) for r in (result, healthy)))


def test_it_ends_when_all_have_diverged_and_does_not_go_on(on_one):
    result, losses = together(on_one, limit=0.1, log_every=4)
    assert result.statuses == ("diverged",) * 8
    assert result.step < STEPS
    assert [list(each) for each in losses] == [[1]] * 8
    again, losses = together(on_one, result, limit=0.1)
    assert again.step == result.step
    assert losses == [{}] * 8


def test_a_stop_says_that_the_steps_are_lost(on_one):
    asked = iter([False, False, True])
    with pytest.raises(PreemptedError, match="after 2 of 12 steps, which are lost"):
        together(on_one, preempted=lambda: next(asked))


def test_a_batch_that_lanes_share_is_read_once(on_one):
    class Counting(Walks):
        reads = 0

        def batch_at(self, step, rows=slice(None)):
            Counting.reads += 1
            return super().batch_at(step, rows)

    shared = Counting(0)
    tokens_LBS = place_lanes([shared, BATCHES[2], shared], 3, on_one.batch_sharding)
    assert Counting.reads == 1
    np.testing.assert_array_equal(tokens_LBS, np.stack([batch_at(3), batch_at(1003), batch_at(3)]))


@pytest.mark.parametrize(
    ("lanes", "devices", "parts"),
    [(8, 8, 8), (9, 8, 8), (3, 8, 4), (5, 8, 8), (1, 8, 1), (8, 1, 1), (2, 6, 2), (4, 6, 6)],
)
def test_lanes_are_spread_over_what_holds_them(lanes, devices, parts):
    assert spread(lanes, devices) == parts


def test_a_mesh_has_the_axis_only_if_asked():
    assert make_mesh(-1, 2, run=2).shape == {"run": 2, "data": 2, "fsdp": 2, "tensor": 1}
    assert "run" not in make_mesh().shape
    with pytest.raises(ValueError, match=r"run=3 × data=2 × .* needs 6 devices, there are 8"):
        make_mesh(2, run=3)
    with pytest.raises(ValueError, match="run=-1"):
        make_mesh(run=-1)
