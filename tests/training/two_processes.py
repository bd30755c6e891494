"""One of two processes that train together, for test_processes.py; two virtual devices each.

Called with a port, the process's number and a folder, in which it writes what it found.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax

from qat.training.checkpoint import Checkpoints
from qat.training.processes import FailedElsewhereError, PreemptedError, Preemption, agree
from qat.training.sharding import make_mesh
from qat.training.step import evaluate
from tests.training_checks import Walks, abstract, constants, programs_on, run


def main(port, number, folder):
    jax.distributed.initialize(f"localhost:{port}", 2, number)
    programs = programs_on(make_mesh(2, 2, 1))
    found = {}
    for policy in ("none", "w4a8kv4"):
        with Checkpoints(folder / f"by-two-{policy}", {}) as checkpoints:
            result = run(programs, policy, steps=10, checkpoints=checkpoints)
        found[policy] = list(result.losses.values())
    with Checkpoints(folder / "by-one", {}) as checkpoints:
        state = checkpoints.restore(abstract(programs), programs.state_sharding)
    result = run(programs, steps=10, state=state)
    found["restored"] = list(result.losses.values())
    losses_B = evaluate(programs, result.state.params, constants(), Walks(1))
    found["evaluated"] = losses_B.tolist()
    found["agreed"] = agree(lambda: 7 + jax.process_index())
    found["failed"] = failure()
    found["preempted"] = preempted(programs, number)
    (folder / f"found-{number}.json").write_text(json.dumps(found))


def failure():
    """What a process sees when the first one fails."""

    def refuse():
        raise ValueError("not this one")

    try:
        agree(refuse)
    except FailedElsewhereError:
        return "elsewhere"
    except ValueError as error:
        return str(error)


def preempted(programs, number):
    """Where a run of slow steps stops after the second process has been told to."""

    class Slow(Walks):
        def batch_at(self, step, rows=slice(None)):
            if step == 2 and number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            return super().batch_at(step, rows)

    try:
        with Preemption() as preemption:
            run(programs, steps=1000, preempted=preemption, batches=Slow(1000))
    except PreemptedError as stopped:
        return str(stopped)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
