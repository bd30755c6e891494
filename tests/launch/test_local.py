"""The pool of workers, with workers that only pretend: who gets what, and who dies of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import main
from launch.sweeps import local, working
from launch.sweeps.commands import Job, deal
from launch.sweeps.local import Pool
from qat.training.processes import Preemption

ROOT = Path(__file__).parents[2]
WORKER = """
import json, os, pathlib, signal, sys, time
folder, core = pathlib.Path(sys.argv[1]), sys.argv[2]
def tell(**fields): print(json.dumps(fields), flush=True)
with (folder / "born.txt").open("a") as born:
    born.write("x")
if len((folder / "born.txt").read_text()) <= {stillborn}:
    print("stillborn", file=sys.stderr, flush=True)
    os.kill(os.getpid(), 9)
print("5\\n[1]\\n{{}}\\nno json")
tell(event="ready", platform="{platform}")
def save(number, frame):
    (folder / "saved.txt").write_text(run)
    sys.exit(75)
signal.signal(signal.SIGTERM, signal.SIG_IGN if {stubborn} else save)
for line in sys.stdin:
    run = line.strip()
    with (folder / "order.txt").open("a") as order:
        order.write(f"{{core}} {{run}}\\n")
    tries = folder / f"{{run}}.tries"
    tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
    tell(event="trained", run=run, tokens=1.0)
    if run.startswith("kills") or (run.startswith("once") and len(tries.read_text()) == 1):
        print("it hurts", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9)
    if run.startswith("long") and len(tries.read_text()) == 1:
        time.sleep(60)
    if run == "full":
        print("error: no space left: rows.jsonl", file=sys.stderr, flush=True)
        sys.exit(2)
    tell(event="done", run=run, status="ok")
"""


@pytest.fixture
def pool(tmp_path):
    def pool(names, workers=2, platform="cpu", stillborn=0, stubborn=False):
        program = WORKER.format(platform=platform, stillborn=stillborn, stubborn=stubborn)
        command = [sys.executable, "-c", program, str(tmp_path)]
        jobs = [Job((name,), shape, work) for name, shape, work in names]
        return Pool(command, jobs, tmp_path / "logs", workers)

    return pool


def events_of(pool):
    heard = []
    pool.run(heard.append)
    return heard


def done(events):
    return sorted(event["run"] for event in events if event["event"] == "done")


def test_every_run_is_done_once_by_as_many_workers_as_asked(pool, tmp_path):
    names = [(f"r{index}", "one", 1.0) for index in range(20)]
    assert done(events_of(pool(names))) == sorted(name for name, _, _ in names)
    lines = (tmp_path / "order.txt").read_text().splitlines()
    assert len(lines) == 20
    assert len({line.split()[0] for line in lines}) <= 2


def test_an_accelerator_has_one_worker(pool, tmp_path):
    events_of(pool([(f"r{index}", "one", 1.0) for index in range(8)], platform="tpu"))
    lines = (tmp_path / "order.txt").read_text().splitlines()
    assert len({line.split()[0] for line in lines}) == 1


def test_a_worker_stays_with_its_shape_and_begins_with_the_longest(pool, tmp_path):
    names = [(f"{shape}{index}", shape, index) for shape in "ab" for index in range(4)]
    events_of(pool(names, workers=1))
    runs = [line.split()[1] for line in (tmp_path / "order.txt").read_text().splitlines()]
    assert [run[0] for run in runs] in (list("aaaabbbb"), list("bbbbaaaa"))
    assert runs[:4] == sorted(runs[:4], reverse=True)


def test_a_run_whose_worker_dies_is_tried_again(pool):
    events = events_of(pool([("once", "one", 1.0), ("r", "one", 1.0)]))
    assert done(events) == ["once", "r"]
    (lost,) = [event for event in events if event["event"] == "lost"]
    assert lost == {"event": "lost", "run": "once", "given_up": False, "reason": "it hurts"}


def test_a_run_that_kills_three_workers_is_given_up_and_the_others_are_done(pool, tmp_path):
    names = [("kills", "one", 9.0), *((f"r{index}", "one", 1.0) for index in range(5))]
    events = events_of(pool(names))
    assert done(events) == [f"r{index}" for index in range(5)]
    given_up = [event["given_up"] for event in events if event["event"] == "lost"]
    assert given_up == [False, False, True]
    assert (tmp_path / "kills.tries").read_text() == "xxx"


def test_a_full_disk_stops_all_with_the_workers_own_words(pool):
    with pytest.raises(OSError, match=r"^no space left: rows\.jsonl$"):
        events_of(pool([("full", "one", 1.0), ("r", "one", 0.5)]))


def test_a_worker_that_dies_before_it_has_a_run_is_replaced(pool, tmp_path):
    names = [(f"r{index}", "one", 1.0) for index in range(4)]
    assert done(events_of(pool(names, stillborn=2))) == [name for name, _, _ in names]


def test_workers_that_all_die_before_they_begin_end_the_sweep(pool, tmp_path):
    with pytest.raises(OSError, match=r"^a worker ended by itself: stillborn$"):
        events_of(pool([("r", "one", 1.0)], stillborn=99))
    assert (tmp_path / "born.txt").read_text() == "xxx"


def test_a_run_whose_worker_is_told_to_leave_goes_on_in_another(pool, tmp_path):
    heard = []
    waiting = pool([("long", "one", 1.0)])

    def on_event(event):
        heard.append(event)
        if event["event"] == "trained" and len(heard) < 4:
            waiting._running[0].terminate()

    waiting.run(on_event)
    kinds = [event["event"] for event in heard]
    assert kinds == ["ready", "trained", "left", "ready", "trained", "done"]


@pytest.fixture
def heeded_signals():
    """Handlers as in a terminal; what is started behind a shell's & ignores Ctrl-C."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("heeded_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_workers_save_and_begins_nothing_more(pool, tmp_path, number):
    heard = []
    waiting = pool([("long", "one", 2.0), ("r", "one", 1.0)], workers=1)

    def on_event(event):
        heard.append(event["event"])
        if event["event"] == "trained":
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(main.StoppedError) as stopped, main.stopping(waiting.stop):
        waiting.run(on_event)
    assert stopped.value.args == (number,)
    assert signal.getsignal(number) is before
    assert heard == ["ready", "trained", "stopping"]
    assert (tmp_path / "saved.txt").read_text() == "long"
    assert not (tmp_path / "r.tries").exists()


def test_a_worker_that_does_not_leave_is_ended(pool, monkeypatch):
    monkeypatch.setattr(local, "LEAVING_S", 0.3)
    waiting = pool([("long", "one", 1.0)], stubborn=True)
    start = time.monotonic()
    waiting.run(lambda event: event["event"] == "trained" and waiting.stop())
    assert time.monotonic() - start < 20


def test_a_second_signal_does_not_wait():
    program = "import os, signal, time; from launch import main\n"
    program += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "with main.stopping(lambda: os.write(1, b'asked\\n')):\n"  # print may be amid itself
    program += "    print('ready', flush=True); time.sleep(60); time.sleep(60)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, **pipes) as process:
        for line in ("ready\n", "asked\n"):
            assert process.stdout.readline() == line
            process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1] == "stopped; the same command goes on from here\n"
    assert process.returncode == 130


@pytest.mark.parametrize("working_then", [True, False])
def test_a_worker_whose_driver_is_gone_is_preempted_amid_work_alone(monkeypatch, working_then):
    monkeypatch.setattr(working, "_MOMENT_S", 0.1)
    monkeypatch.setattr(working, "LEAVING_S", 1e6)
    read, write = os.pipe()
    os.write(write, b"a\n")
    with Preemption() as preempted, os.fdopen(read) as source:
        lines = working.asked(source)
        assert next(lines) == "a"
        deadline = time.monotonic() + (10 if working_then else 0.5)
        os.close(write)
        if not working_then:
            assert list(lines) == []
        while not preempted() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert preempted() == working_then


def test_hands_have_one_shape_each_and_about_equal_work():
    jobs = [Job((f"a{i}",), "a", 3.0) for i in range(12)] + [
        Job((f"b{i}",), "b", 1.0) for i in range(12)
    ]
    hands = deal(jobs, 4)
    assert len(hands) == 4
    assert all(len({job.shape for job in hand}) == 1 for hand in hands)
    assert sorted(job.word for hand in hands for job in hand) == sorted(j.word for j in jobs)
    assert sorted(sum(job.work for job in hand) for hand in hands) == [12, 12, 12, 12]
    assert len(deal(jobs, 0)) == 2
    assert max(map(len, deal([Job((str(i),), "a", 1.0) for i in range(2500)], 1))) <= 1000
