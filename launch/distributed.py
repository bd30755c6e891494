"""Joins the processes of a run: found on TPU pods and under Slurm, named by flags elsewhere.

    python -m launch.train … --coordinator=host0:1234 --processes=2 --process_id=0

Every process runs the same command. Process 0 prints, claims the workdir and writes results; the
others print errors alone. A single process needs none of this.
"""

import importlib.util
import os
import sys
import threading
from pathlib import Path

from absl import flags

from launch.main import BAD_INPUT

_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, where processes are started by hand."
)
_PROCESSES = flags.DEFINE_integer("processes", None, "Processes of the run.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This one, from 0.", lower_bound=0)
_START_SECONDS = flags.DEFINE_integer(
    "start_seconds", 300, "How long processes wait for one another at the start.", lower_bound=1
)


def start() -> None:
    """Joins the other processes, if there are any; to be called before JAX is used.

    Ends the program with one line where they do not find one another in time.

    Raises:
        ValueError: the flags do not say enough, or contradict one another.
        OSError: the coordinator's port is taken, or the job does not say who takes part.
    """
    by_hand = _by_hand()
    if not by_hand and not _under_slurm() and not _on_tpu():
        return
    import jax

    seconds = _START_SECONDS.value
    timer = threading.Timer(seconds, _give_up, [seconds])
    timer.start()
    try:
        jax.distributed.initialize(  # finds out itself what is None
            _COORDINATOR.value,
            _PROCESSES.value,
            _PROCESS_ID.value,
            initialization_timeout=seconds + 60,  # after which it would abort with a stack trace
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise OSError(f"this process cannot join the others: {reason}") from error
    finally:
        timer.cancel()
    if jax.process_index():
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115


def _give_up(seconds: int) -> None:
    coordinator = f" at {_COORDINATOR.value}" if _COORDINATOR.value else ""
    line = f"error: the processes{coordinator} did not find one another within {seconds} s"
    print(f"{line}; expected all to be started, see --start_seconds", file=sys.stderr, flush=True)
    os._exit(BAD_INPUT)  # the main thread waits in C++


def _by_hand() -> bool:
    """Whether flags name the processes.

    Raises:
        ValueError: they do not say enough, or contradict one another.
    """
    coordinator, processes, process_id = _COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value
    if coordinator is None and processes is None and process_id is None:
        return False
    if coordinator is None or processes is None or process_id is None:
        raise ValueError(
            f"--coordinator={coordinator} --processes={processes} --process_id={process_id}: "
            "expected all three or none"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--coordinator={coordinator}: expected host:port")
    if process_id >= processes:
        raise ValueError(f"--process_id={process_id}: expected less than --processes={processes}")
    return True


def _under_slurm() -> bool:
    """In a step of several tasks; a batch script itself is one process, whatever the job has."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def _on_tpu() -> bool:
    """On a machine with TPU chips, which may be one of a pod; JAX finds out which."""
    if os.environ.get("JAX_PLATFORMS", "tpu").partition(",")[0] != "tpu":
        return False
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None
