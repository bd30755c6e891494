"""Commands on a real cluster: placed, limited, failed, cancelled, told to leave, found again."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qat.sweep import slurm
from tests.slurm.cluster import started, wait_until

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slurm

# Waits to be told to leave, saves, and is done at its second visit.
LEAVES = """
name = sys.argv[1] + os.environ["SLURM_PROCID"]
def leave(number, frame):
    time.sleep(2 * int(os.environ["SLURM_PROCID"]))  # the first to leave must not end the others
    Path("saved-" + name).touch()
    os._exit(75)
signal.signal(signal.SIGTERM, leave)
if Path("saved-" + name).exists():
    sys.exit(print("went on", name, flush=True))
Path("started-" + name).touch()
time.sleep(100)
"""
# Is told to leave before it could listen.
DEAF = """
if not Path("started-deaf").exists():
    Path("started-deaf").touch()
    time.sleep(100)
"""
BY_ITSELF = "Path('n').open('a').write('x'); sys.exit(75 if Path('n').read_text() == 'x' else 4)"
SLEEPS = "Path(sys.argv[1]).touch(); time.sleep(60)"


def ended(jobs, seconds=40.0):
    """The states of jobs that have all ended."""
    try:
        wait_until(lambda: all(status.ended for status in jobs.states()), seconds)
    except TimeoutError:
        raise TimeoutError(str([(s, s.last_lines()) for s in jobs.states()])) from None
    return jobs.states()


def words(jobs):
    return [status.state for status in jobs.states()]


def test_two_commands_run_at_once_on_two_nodes(submit, python):
    meet = """
Path(sys.argv[1]).touch()
while not Path(sys.argv[2]).exists(): time.sleep(0.1)
print(os.environ["SLURMD_NODENAME"], os.environ["SLURM_CPUS_PER_TASK"], os.environ["GREETING"])
"""
    commands = [python(meet, "a", "b"), python(meet, "b", "a")]
    jobs = submit(*commands, cpus_per_task=2, environment={"GREETING": "it's"})
    statuses = ended(jobs)
    assert [(s.state, s.exit_code) for s in statuses] == [("done", 0)] * 2
    assert [s.command for s in statuses] == [tuple(command) for command in commands]
    assert {s.last_lines(1) for s in statuses} == {"127.0.0.1 2 it's", "127.0.0.2 2 it's"}


def test_no_more_than_the_limit_run_at_once(submit, python):
    alone = """
Path("running").mkdir()  # an error if it exists
time.sleep(0.5)
Path("running").rmdir()
"""
    jobs = submit(*[python(alone, i) for i in range(3)], at_once=1)
    assert "pending" in words(jobs)
    assert [s.state for s in ended(jobs)] == ["done"] * 3


def test_a_failure_tells_its_exit_code_and_its_last_words(submit, python):
    fails = submit(python("print('one'); print('two', file=sys.stderr); sys.exit(3)"))
    (status,) = ended(fails)
    assert (status.state, status.exit_code) == ("failed", 3)
    assert "two" in status.last_lines(3).splitlines()
    assert {"one", "two"} <= set(status.log.read_text().splitlines())


def test_a_killed_command_fails(submit, python):
    (status,) = ended(submit(python("os.kill(os.getpid(), signal.SIGKILL)")))
    assert (status.state, status.exit_code) == ("failed", 128 + signal.SIGKILL)


def test_cancelled_commands_end_and_stay_ended(submit, python, tmp_path):
    jobs = submit(python(LEAVES, "first"), python(SLEEPS, "second"), at_once=1)
    wait_until((tmp_path / "started-first0").exists)
    jobs.cancel()
    statuses = ended(jobs)
    assert [(s.state, s.reason) for s in statuses] == [("failed", "CANCELLED")] * 2
    assert (tmp_path / "saved-first0").exists()  # exit code 75, and yet not requeued
    assert not (tmp_path / "second").exists()
    jobs.cancel()  # nothing left


def test_whoever_must_leave_saves_and_goes_on(cluster, submit, python, tmp_path):
    wide = submit(python(LEAVES, "wide"), folder="wide", nodes=2)
    normal = submit(python(LEAVES, "normal"), folder="normal")  # ended and requeued by Slurm
    graceful = submit(  # told to leave while it goes on running, requeued by its script
        python(LEAVES, "graceful"), python(DEAF), folder="graceful", partition="graceful"
    )
    wait_until(lambda: len([*tmp_path.glob("started-*")]) == 5)
    by_itself = submit(python(BY_ITSELF), folder="by-itself")
    cluster.preempt()
    told = ["normal0", "graceful0", "wide0", "wide1"]
    assert all((tmp_path / f"saved-{name}").exists() for name in told)
    assert words(normal) + words(graceful) + words(wide) == ["preempted"] * 4
    for jobs in (normal, graceful, wide):
        assert {(s.state, s.exit_code) for s in ended(jobs)} == {("done", 0)}
    logs = "".join(s.log.read_text() for jobs in (normal, graceful, wide) for s in jobs.states())
    assert all(logs.count(f"went on {name}\n") == 1 for name in told)
    (status,) = ended(by_itself)
    assert (status.state, status.exit_code) == ("failed", 4)  # at its second visit


@pytest.mark.slow  # Slurm counts in minutes
def test_a_command_may_take_longer_than_its_limit(submit, python):
    jobs = submit(python(LEAVES, "long"), minutes=2, notice_s=30)
    (status,) = ended(jobs, seconds=180)
    assert (status.state, status.last_lines(1)) == ("done", "went on long0")


def test_a_command_of_two_nodes_is_one_run(submit):
    command = [sys.executable, "-m", "tests.slurm.two_nodes"]
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    (status,) = ended(submit(command, nodes=2, environment=environment))
    assert status.state == "done", status.last_lines()
    assert "2 processes, sum 3" in status.last_lines().splitlines()


@pytest.mark.parametrize("count", [1, 3])
def test_a_killed_driver_finds_its_jobs_again(submit, python, tmp_path, count):
    commands = [python(SLEEPS, i) for i in range(count)]
    driver = f"""
import os, submitit
from pathlib import Path
from qat.sweep import slurm
submitit.SlurmExecutor._get_job_id_from_submission_command = lambda *output: os._exit(9)
slurm.submit({commands!r}, Path({str(tmp_path / "jobs")!r}), slurm.Resources())
"""
    killed = subprocess.run([sys.executable, "-c", driver], cwd=ROOT)
    assert killed.returncode == 9  # right after sbatch
    assert not {*words(slurm.find(tmp_path / "jobs"))} - {"pending", "running"}
    assert len(submit(*commands).states()) == count
    assert len(in_queue("%j")) == count
    with pytest.raises(ValueError, match="other commands have not ended"):
        submit(python(SLEEPS, "other"))


def test_ended_commands_are_submitted_anew_among_those_that_run(submit, python, tmp_path):
    long, short = python(SLEEPS, "long"), python("print('again')")
    jobs = submit(long, short)
    wait_until(lambda: words(jobs) == ["running", "done"])
    again = submit(short, long)
    assert [s.command for s in again.states()] == [tuple(short), tuple(long)]
    wait_until(lambda: words(again) == ["done", "running"])
    first, second = jobs.states()[1].log, again.states()[0].log
    assert first != second
    assert first.read_text().splitlines()[-1] == second.read_text().splitlines()[-1] == "again"
    found = {s.command: s.log for s in slurm.find(tmp_path / "jobs").states()}
    assert found[tuple(short)] == second


def test_jobs_of_a_cluster_that_was_rebuilt_are_not_mistaken(
    submit, python, tmp_path, monkeypatch, tmp_path_factory
):
    early, late = submit(python("print('early')")), python(SLEEPS, "started")
    ended(early)
    jobs = submit(late)
    (job_id,) = in_queue("%A")
    folder = tmp_path_factory.mktemp("rebuilt")
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        with started(folder, first_job=job_id):
            other = ["sbatch", "--wrap=sleep 60", "--output=/dev/null"]
            subprocess.run(other, check=True, capture_output=True)
            (lost,) = jobs.states()
            assert (lost.state, lost.reason) == ("failed", "Slurm does not know it")
            assert words(early) == ["done"]
            jobs.cancel()
            assert in_queue("%A") == [job_id]


def test_what_slurm_refuses_is_told_in_one_line(submit, python):
    with pytest.raises(OSError, match=r"invalid partition specified: nowhere") as caught:
        submit(python("pass"), partition="nowhere")
    assert "\n" not in str(caught.value)
    assert [s.state for s in ended(submit(python("pass")))] == ["done"]  # nothing is in the way


def in_queue(column):
    queue = ["squeue", "--me", "--array", "--noheader", f"--format={column}"]
    return subprocess.run(queue, check=True, capture_output=True, text=True).stdout.split()
