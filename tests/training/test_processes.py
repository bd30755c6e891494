"""Several processes: the same losses, each other's checkpoints, one word for all; SIGTERM."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from qat.training.checkpoint import Checkpoints
from qat.training.processes import PreemptedError, Preemption, agree, place
from qat.training.sharding import BATCH, make_mesh
from qat.training.step import evaluate
from tests.training_checks import Walks, abstract, batch_at, constants, run

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def alone(programs, tmp_path_factory):
    """A folder with what one process saved after 5 of 10 steps, and its run to the end."""
    folder = tmp_path_factory.mktemp("processes")
    with Checkpoints(folder / "by-one", {}) as checkpoints:
        run(programs, steps=10, stop=5, checkpoints=checkpoints)
    return folder, run(programs, steps=10)


@pytest.fixture(scope="module")
def together(alone):
    """What two processes found, in the same folder."""
    folder, _ = alone
    flags = "--xla_force_host_platform_device_count=2"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "tests.training.two_processes", str(free_port())]
    options = {"cwd": ROOT, "env": environment, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([*command, str(number), str(folder)], **options) for number in (0, 1)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    return [json.loads((folder / f"found-{number}.json").read_text()) for number in (0, 1)]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(("policy", "tolerance"), [("none", 1e-5), ("w4a8kv4", 1e-4)])
def test_two_processes_lose_what_one_does(programs, together, policy, tolerance):
    single = [*run(programs, policy, steps=10).losses.values()]
    for found in together:
        np.testing.assert_allclose(found[policy], single, rtol=tolerance)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_both_processes_see_the_same(together):
    first, second = together
    assert {**first, "failed": None} == {**second, "failed": None}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_go_on_from_a_checkpoint_of_one(programs, alone, together):
    _, whole = alone
    np.testing.assert_allclose(together[0]["restored"], [*whole.losses.values()][5:], rtol=1e-5)
    losses_B = evaluate(programs, whole.state.params, constants(), Walks(1))
    np.testing.assert_allclose(together[0]["evaluated"], losses_B, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_one_process_goes_on_from_a_checkpoint_of_two(programs, alone, together):
    folder, whole = alone
    assert together
    with Checkpoints(folder / "by-two-none", {}) as checkpoints:
        state = checkpoints.restore(abstract(programs), programs.state_sharding)
    assert int(state.step) == 10
    for mine, theirs in zip(jax.tree.leaves(whole.state), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(np.asarray(theirs), np.asarray(mine), rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_first_process_decides_and_its_failure_ends_all(together):
    assert [found["agreed"] for found in together] == [7, 7]
    assert [found["failed"] for found in together] == ["not this one", "elsewhere"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_when_one_process_is_preempted_all_stop_at_the_same_step(together):
    first, second = (found["preempted"] for found in together)
    assert first == second
    assert first.endswith("of 1000 steps")


def test_one_process_agrees_with_itself():
    assert agree(lambda: -3) == -3
    with pytest.raises(OSError, match="mine"):
        agree(lambda: (_ for _ in ()).throw(OSError("mine")))


def test_sigterm_stops_a_run_and_is_left_as_it_was(programs):
    before = signal.getsignal(signal.SIGTERM)
    tell = lambda step, metrics: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    with Preemption() as preempted, pytest.raises(PreemptedError, match=r"after 1\d of 30"):
        run(programs, preempted=preempted, on_log=tell)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 1, 8)])
def test_a_batch_is_placed_whole_in_order(shape):
    sharding = NamedSharding(make_mesh(*shape), BATCH)
    tokens_BS = batch_at(0)
    placed_BS = place(Walks(1), 0, sharding)
    assert placed_BS.sharding == sharding
    np.testing.assert_array_equal(placed_BS, tokens_BS)
    for shard in placed_BS.addressable_shards:
        np.testing.assert_array_equal(shard.data, tokens_BS[shard.index])
