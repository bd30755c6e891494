"""What is told where there is no cluster, or none that answers; no Slurm is needed."""

import json
import sys

import pytest

from launch.sweeps.cluster import resources_of
from qat.sweep import slurm


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Puts shell programs, given as text by name, in the place of all others."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def put(**texts):
        for name, text in texts.items():
            program = folder / name
            program.write_text(f"#!/bin/sh\n{text}\n")
            program.chmod(0o755)

    return put


@pytest.fixture
def jobs(tmp_path):
    """Two commands that were submitted, of which nothing else is known."""
    record = {"name": "qat-0", "commands": [["a"], ["b", "c d"]]}
    (tmp_path / "0001").mkdir()
    (tmp_path / "0001" / "array.json").write_text(json.dumps(record))
    return slurm.find(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nodes": 0}, "nodes: expected a whole number from 1 on, got 0"),
        ({"minutes": 1.5}, "minutes: expected a whole number from 1 on, got 1.5"),
        ({"gpus_per_node": -1}, "gpus_per_node: expected a whole number from 0 on, got -1"),
        ({"at_once": 0}, "at_once: expected a whole number from 1 on, got 0"),
        ({"minutes": 3}, "minutes = 3: expected at least 4 minutes with notice_s = 120"),
        ({"extra": {"--qos": "a"}}, "extra option '--qos': expected one of sbatch's without dash"),
        ({"extra": {"job_name": "a"}}, "extra option 'job_name': expected"),
    ],
)
def test_resources_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        slurm.Resources(**wrong)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "minuts=3",
            "'minuts'; nearest is 'minutes'; an option of sbatch is written --slurm=--min",
        ),
        ("ntasks-per-node=2", "nearest is 'tasks_per_node'"),
        ("minutes", "expected a name and a value, such as minutes=240"),
        ("minutes=3", "--slurm: minutes = 3: expected at least 4 minutes"),
        ("minutes=soon", "--slurm: minutes: expected a whole number"),
    ],
)
def test_a_flag_of_resources_that_cannot_be(word, message):
    with pytest.raises(ValueError, match=message):
        resources_of([word], 0)


def test_options_of_sbatch_are_written_with_or_without_dashes():
    found = resources_of(["minutes=30", "constraint=a100", "--ntasks-per-core=2"], 4)
    extra = {"constraint": "a100", "ntasks-per-core": "2"}
    assert found == slurm.Resources(minutes=30, at_once=4, extra=extra)


@pytest.mark.parametrize("commands", [[], [["a"], []], [["a"], ["a"]]])
def test_commands_that_cannot_be(tmp_path, commands):
    with pytest.raises(ValueError, match="commands: expected different ones, at least one"):
        slurm.submit(commands, tmp_path / "jobs", slurm.Resources())
    assert not (tmp_path / "jobs").exists()


def test_without_submitit_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(OSError, match=r"submitit is not installed: .* 'qat-jax\[slurm\]'"):
        slurm.submit([["a"]], tmp_path, slurm.Resources())


@pytest.mark.slurm
def test_without_slurm_nothing_is_submitted(submitit, tmp_path, programs):
    with pytest.raises(OSError, match=r"cannot submit to Slurm: .*srun"):
        slurm.submit([["a"]], tmp_path / "jobs", slurm.Resources())
    assert slurm.find(tmp_path / "jobs") is None


@pytest.mark.slurm
def test_a_folder_that_slurm_would_misread(submitit, tmp_path):
    with pytest.raises(ValueError, match="expected a folder without %"):
        slurm.submit([["a"]], tmp_path / "100%", slurm.Resources())


def test_a_cluster_that_does_not_answer_is_no_lost_job(jobs, programs):
    with pytest.raises(OSError, match="squeue is not installed: expected a machine of a cluster"):
        jobs.states()
    programs(squeue="echo 'Unable to contact\n slurm controller' >&2; exit 1")
    with pytest.raises(OSError, match=r"^squeue: Unable to contact slurm controller$"):
        jobs.states()


@pytest.mark.parametrize(
    ("line", "state", "reason"),
    [
        ("PENDING 0 Resources", "pending", "Resources"),
        ("PENDING 2 (launch failed requeued held)", "preempted", "(launch failed requeued held)"),
        ("REQUEUE_HOLD 1 None", "preempted", "None"),
        ("CONFIGURING 0 None", "running", ""),
        ("COMPLETING 0 None", "running", ""),
        ("SUSPENDED 0 None", "running", ""),
        ("COMPLETED 0 None", "done", ""),
        ("TIMEOUT 0 TimeLimit", "failed", "TIMEOUT"),
        ("OUT_OF_MEMORY 0 OutOfMemory", "failed", "OUT_OF_MEMORY"),
    ],
)
def test_the_words_of_slurm(jobs, programs, line, state, reason):
    programs(squeue=f"echo '17_1 qat-0 1 {line}'")
    other, status = jobs.states()
    assert status.command == ("b", "c d")
    assert (status.state, status.reason) == (state, reason)
    assert (other.state, other.reason) == ("failed", "Slurm does not know it")


def test_what_a_job_wrote_outlives_the_memory_of_slurm(jobs, programs, tmp_path):
    programs(squeue="true")
    (tmp_path / "0001" / "0.exit").write_text("0\n")
    (tmp_path / "0001" / "1.exit").write_text("3\n")
    (tmp_path / "0001" / "1.log").write_text("a\nb\nc\n")
    first, second = jobs.states()
    assert (first.state, first.exit_code, first.last_lines()) == ("done", 0, "")
    assert (second.state, second.exit_code, second.last_lines(2)) == ("failed", 3, "b\nc")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"name": "a", "commands": 3}'])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / "0001").mkdir()
    (tmp_path / "0001" / "array.json").write_text(text)
    with pytest.raises(ValueError, match=r"0001/array.json is damaged"):
        slurm.find(tmp_path)
