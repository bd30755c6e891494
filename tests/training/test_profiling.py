"""The profiler's window: how it is spelled, which steps it records, that it always ends."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from qat.training.profiling import parse_window, profiled
from qat.training.step import Programs

STATE = types.SimpleNamespace(step=5)


@pytest.fixture
def trace(monkeypatch):
    """What happened, in order, with the profiler itself left out."""
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    return events


def programs(events):
    def train_step(state, name):
        events.append(name)
        return state, name

    others = {field.name: None for field in dataclasses.fields(Programs)}
    return Programs(**{**others, "train_step": train_step})


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (range(6, 8), ["a", "start", "b", "c", "stop", "d"]),
        (range(0, 7), ["start", "a", "b", "stop", "c", "d"]),  # restored within the window
        (range(7, 99), ["a", "b", "start", "c", "d", "stop"]),  # the run ends within it
        (range(0, 5), ["a", "b", "c", "d"]),  # restored after it
    ],
)
def test_a_window_of_steps_is_recorded(trace, tmp_path, window, expected):
    with profiled(programs(trace), window, tmp_path) as recorded:
        for name in "abcd":
            assert recorded.train_step(STATE, name) == (STATE, name)
    assert trace == expected


def test_a_recording_ends_when_training_fails(trace, tmp_path):
    def fail(window):
        with profiled(programs(trace), window, tmp_path) as recorded:
            recorded.train_step(STATE, "a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail(range(5, 9))
    assert trace == ["start", "a", "stop"]


def test_jax_writes_a_trace(tmp_path):
    step = jax.jit(lambda state, x: (state, jnp.sum(x @ x)))
    state = jnp.zeros((), jnp.int32)
    with_step = types.SimpleNamespace(train_step=lambda s, x: (s, step(state, x)[1]))
    plain = dataclasses.replace(programs([]), train_step=with_step.train_step)
    with profiled(plain, range(6, 7), tmp_path / "profile") as recorded:
        for _ in range(3):
            recorded.train_step(STATE, jnp.ones((8, 8)))
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0


def test_a_window_is_spelled_as_a_slice():
    assert parse_window("10:13", 100) == range(10, 13)
    assert parse_window("0:200", 100) == range(0, 200)


@pytest.mark.parametrize("text", ["10", "10-13", "13:10", "5:5", "a:b", ":5", "-1:5", "100:110"])
def test_a_bad_window_is_one_line(text):
    with pytest.raises(ValueError, match=r"expected start:stop .* 100 steps, such as '10:13'") as e:
        parse_window(text, 100)
    assert str(e.value).startswith(f"profile {text!r}: ")


def test_the_example_fits_a_short_run():
    with pytest.raises(ValueError, match="2 steps, such as '1:2'"):
        parse_window("5", 2)
