"""What Slurm gives each command of an array, and the batch script around it.

srun starts the command once for each task. When all tasks have ended, the script asks whether the
job is still RUNNING for Slurm; otherwise it was cancelled, or Slurm requeues it by itself, and the
script has no say. Then it looks at the highest exit code. 75 says that the command was told to
leave and has saved; 143, that SIGTERM ended it before it could listen: back into the queue. Any
other code is the command's last word and goes into a file.

The script waits for all tasks rather than ending them with the first: the others may be saving.
"""

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.spelling import expected_instead

_EARLY_S = 60  # Slurm looks at the clock once in a while
_OURS = ("array", "job-name", "open-mode", "output", "requeue", "signal")


@dataclasses.dataclass(frozen=True)
class Resources:
    """What each command gets.

    Attributes:
        partition: of the cluster; its default if None.
        account: that pays; the user's default if None.
        nodes: machines. With several, or with several tasks, every task runs the command, and the
            processes find one another as `jax.distributed` does under Slurm.
        tasks_per_node: processes on each.
        cpus_per_task: processors of each process.
        gpus_per_node: graphics processors on each machine.
        memory: of each machine, as Slurm spells it, such as 16G; the partition's default if None.
        minutes: time limit of one visit.
        at_once: how many commands may run at the same time; any number if None.
        notice_s: seconds before the time limit at which SIGTERM comes; up to a minute earlier.
        extra: further options of sbatch without dashes, such as {"constraint": "a100"}.

    Raises:
        ValueError: a number is below its least, the notice takes the whole time, or `extra` sets
            what is set here.
    """

    partition: str | None = None
    account: str | None = None
    nodes: int = 1
    tasks_per_node: int = 1
    cpus_per_task: int = 1
    gpus_per_node: int = 0
    memory: str | None = None
    minutes: int = 60
    at_once: int | None = None
    notice_s: int = 120
    extra: Mapping[str, str | int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        least = {field.name: 1 for field in dataclasses.fields(self) if field.type is int}
        least |= {"gpus_per_node": 0, "notice_s": 0}
        if self.at_once is not None:
            least["at_once"] = 1
        for name, lowest in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < lowest:
                raise ValueError(expected_instead(name, f"a whole number from {lowest} on", value))
        if self.minutes * 60 <= self.notice_s + _EARLY_S:
            least_minutes = (self.notice_s + _EARLY_S) // 60 + 1
            raise ValueError(
                f"minutes = {self.minutes}: expected at least {least_minutes} minutes with "
                f"notice_s = {self.notice_s}, or every visit would be told to leave at once"
            )
        for name in self.extra:
            if name.startswith("-") or name.replace("_", "-") in _OURS:
                raise ValueError(
                    f"extra option {name!r}: expected one of sbatch's without dashes, and none of "
                    f"{', '.join(_OURS)}, which are needed to follow the jobs"
                )


def parameters(
    folder: Path, name: str, count: int, resources: Resources, environment: Mapping[str, str]
) -> dict[str, Any]:
    """The batch script of an array, as `submitit.SlurmExecutor.update_parameters` takes it.

    Args:
        folder: where command i leaves `i.log` and `i.exit`.
        name: of the array.
        count: of commands; a single one is submitted as a plain job.
        resources: of each.
        environment: further variables.
    """
    log = folder / ("%a.log" if count > 1 else "0.log")
    optional = {
        "partition": resources.partition,
        "account": resources.account,
        "mem": resources.memory,
        "gpus_per_node": resources.gpus_per_node or None,
    }
    return {
        **{key: value for key, value in optional.items() if value is not None},
        "job_name": name,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.tasks_per_node,
        "cpus_per_task": resources.cpus_per_task,
        "time": resources.minutes,
        "array_parallelism": resources.at_once or count,
        "stderr_to_stdout": True,
        # srun does not take over the processors from sbatch; "all" is its own output.
        "srun_args": [f"--cpus-per-task={resources.cpus_per_task}", "--output=all"],
        "setup": [
            "trap : TERM  # outlive the command to requeue it; unlike '', not inherited by it",
            *(f"export {key}={shlex.quote(value)}" for key, value in environment.items()),
        ],
        "teardown": _teardown(folder),
        "additional_parameters": {
            **{key.replace("_", "-"): value for key, value in resources.extra.items()},
            "output": str(log),
            "requeue": True,
            "signal": f"TERM@{resources.notice_s}",
        },
    }


def _teardown(folder: Path) -> list[str]:
    """Shell that ends every job: back into the queue, or the exit code into a file."""
    exit_file = shlex.quote(str(folder)) + '/"${SLURM_ARRAY_TASK_ID:-0}".exit'
    return [
        "code=$?",
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        "job=${job:-$SLURM_JOB_ID}",
        '[ "$(squeue --noheader --jobs=$job --format=%T)" = RUNNING ] || exit $code',
        "case $code in 75|143) scontrol requeue $job && exit 0;; esac",
        f"echo $code > {exit_file}.partial && mv {exit_file}.partial {exit_file}",
        "exit $code",
    ]
