"""A real Slurm of two nodes on this machine, for tests.

Both nodes are daemons of this machine. They are named by loopback addresses, which every program
can connect to without a name server.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel"]
NODES = ["127.0.0.1", "127.0.0.2"]
START_SECONDS = 30

CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
FirstJobId={first_job}
ReturnToService=2
"""
NODE = "NodeName={name} NodeAddr={name} NodeHostname={host} Port={port} CPUs=3 State=UNKNOWN\n"
PARTITIONS = """
PartitionName=normal Nodes=ALL Default=YES MaxTime=60 PriorityTier=1
PartitionName=graceful Nodes=ALL MaxTime=60 PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=9
"""


@dataclass(frozen=True)
class Cluster:
    """Two nodes of three processors.

    Attributes:
        folder: of the cluster's state; its configuration is `slurm.conf`.
    """

    folder: Path

    @property
    def logs(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.rglob("*.log")))

    def preempt(self) -> None:
        """Takes both nodes for a moment with a job of a higher priority."""
        urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--immediate=60"]
        subprocess.run(["srun", *urgent, "true"], check=True, capture_output=True)

    def clear(self) -> None:
        """Cancels what is left of a test's jobs and waits until they are gone."""
        subprocess.run(["scancel", "--quiet", "--me"], check=True)
        wait_until(self.idle)

    def idle(self) -> bool:
        """Whether no job is queued or running and both nodes wait for one."""
        return not _said("squeue", "--noheader") and _states() == ["idle", "idle"]


def reason_to_skip() -> str | None:
    """Why no cluster can be started here."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed: make test-slurm installs them on Debian"
    return None if os.geteuid() == 0 else "only root can start a cluster"


@contextlib.contextmanager
def started(folder: Path, first_job: int | str = 1) -> Iterator[Cluster]:
    """Starts the daemons, waits for both nodes, and stops the daemons at the end.

    To be used with `SLURM_CONF` in the environment pointing at `slurm.conf` in the folder; jobs are
    numbered from `first_job` on.
    """
    folder.chmod(0o755)
    _write_config(folder, first_job)
    with contextlib.ExitStack() as stack:
        for command in _daemons(folder):
            with (folder / f"{Path(command[0]).name}.out").open("ab") as output:
                daemon = subprocess.Popen(command, stdout=output, stderr=output)
            stack.callback(_stop, daemon)
            if command[0] == "munged":
                wait_until((folder / "munge" / "socket").exists)
        cluster = Cluster(folder)
        try:
            wait_until(cluster.idle)
        except TimeoutError:
            raise TimeoutError(cluster.logs) from None
        yield cluster


def wait_until(true, seconds: float = START_SECONDS) -> None:
    """Returns when it is.

    Raises:
        TimeoutError: it is not within the time.
    """
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.1)


def _write_config(folder: Path, first_job: int | str) -> None:
    (folder / "state").mkdir()
    (folder / "munge").mkdir(mode=0o755)
    key = folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    host, ports = socket.gethostname(), _free_ports(1 + len(NODES))
    config = CONFIG.format(folder=folder, host=host, port=ports.pop(), first_job=first_job)
    nodes = [NODE.format(name=name, host=host, port=ports.pop()) for name in NODES]
    (folder / "slurm.conf").write_text(config + "".join(nodes) + PARTITIONS)


def _daemons(folder: Path) -> list[list[str]]:
    munge = [f"--{name}={folder}/munge/{name}" for name in ("socket", "pid-file", "log-file")]
    munge += [f"--key-file={folder}/munge/key", f"--seed-file={folder}/munge/seed"]
    return [
        ["munged", "--foreground", "--force", "--num-threads=2", *munge],
        ["slurmctld", "-D"],
        *(["slurmd", "-D", "-N", node] for node in NODES),
    ]


def _stop(daemon: subprocess.Popen) -> None:
    daemon.terminate()
    try:
        daemon.wait(timeout=20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _states() -> list[str]:
    return _said("sinfo", "--noheader", "--Node", "--partition=normal", "--format=%T").split()


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
