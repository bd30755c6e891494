"""Progress on a terminal and in a file, with a note beside it."""

import io

from rich.console import Console

from launch import progress
from launch.progress import Meter


def test_plain_lines_have_the_note(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    with Meter("Training", 4, "steps") as meter:
        meter.advance(1)
        meter.advance(3, "21 ms/step")
    first, second = capsys.readouterr().out.splitlines()
    assert first == "Training: 1/4 steps, 0 s"
    assert second == "Training: 4/4 steps, 0 s, 0 s left, 21 ms/step"


def test_the_end_is_said_once(monkeypatch, capsys):
    with Meter("Training", 0.3, "steps") as meter:
        for _ in range(3):
            meter.advance(0.1)
        meter.advance(0.0)
        meter.advance(5.0)
    assert capsys.readouterr().out.count("0 s left") == 1


def test_what_came_before_the_first_work_says_nothing_of_the_time_left(monkeypatch, capsys):
    seconds = iter([0.0, 30.0, 32.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    with Meter("Training", 100, "steps") as meter:
        meter.skip(80)
        meter.advance(10)
        meter.advance(4)
    assert capsys.readouterr().out.splitlines() == [
        "Training: 90/100 steps, 30 s",
        "Training: 94/100 steps, 32 s, 3 s left",
    ]


def test_a_bar_has_the_note(monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("rich.progress.get_console", lambda: console)
    with Meter("Training", 4, "steps") as meter:
        meter.advance(4, "21 ms/step, [41% of peak]")
    assert "21 ms/step, [41% of peak]" in screen.getvalue()
