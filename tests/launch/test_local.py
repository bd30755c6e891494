"""The pool of workers, with workers that only pretend: who gets what, and who dies of it."""

import sys

import pytest

from launch.sweeps.commands import Job, deal
from launch.sweeps.local import Pool

WORKER = """
import json, os, pathlib, sys
folder, core = pathlib.Path(sys.argv[1]), sys.argv[2]
def tell(**fields): print(json.dumps(fields), flush=True)
tell(event="ready", platform="{platform}")
for line in sys.stdin:
    run = line.strip()
    with (folder / "order.txt").open("a") as order:
        order.write(f"{{core}} {{run}}\\n")
    tell(event="trained", run=run, tokens=1.0)
    tries = folder / f"{{run}}.tries"
    tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
    if run.startswith("kills") or (run.startswith("once") and len(tries.read_text()) == 1):
        print("it hurts", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9)
    if run == "full":
        print("error: no space left: rows.jsonl", file=sys.stderr, flush=True)
        sys.exit(2)
    tell(event="done", run=run, status="ok")
"""


@pytest.fixture
def pool(tmp_path):
    def pool(names, workers=2, platform="cpu"):
        command = [sys.executable, "-c", WORKER.format(platform=platform), str(tmp_path)]
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
