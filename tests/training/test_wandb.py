"""Weights & Biases against a stand-in for its package."""

import sys
import types

import pytest

from qat.training.scalars import Writer
from qat.training.wandb import WeightsAndBiases


class RefusedError(Exception):
    """Stands for `wandb.errors.Error`."""


class Run:
    def __init__(self):
        self.metrics, self.logged, self.finished = [], [], False

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, numbers):
        assert not self.finished
        self.logged.append(numbers)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    module = types.ModuleType("wandb")
    module.errors = types.SimpleNamespace(Error=RefusedError)
    module.runs = []

    def init(**options):
        if options["project"] == "secret":
            raise RefusedError("permission\ndenied")
        module.runs.append((options, Run()))
        return module.runs[-1][1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_points_are_logged_over_their_own_step(wandb, tmp_path):
    writer = WeightsAndBiases("laws", "abc", {"tokens": 7}, tmp_path / "wandb")
    assert isinstance(writer, Writer)
    writer.write([(1, {"loss": 3.0}), (2, {"loss": 2.0, "step_ms": 5.0})])
    writer.close()
    ((options, run),) = wandb.runs
    assert options == {
        "project": "laws",
        "id": "abc",
        "resume": "allow",
        "config": {"tokens": 7},
        "dir": str(tmp_path / "wandb"),
    }
    assert run.metrics == [("*", "step")]
    assert run.logged == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "step_ms": 5.0}]
    assert run.finished


def test_a_refusal_names_the_project(wandb, tmp_path):
    with pytest.raises(ValueError, match="wandb project 'secret': permission"):
        WeightsAndBiases("secret", "abc", {}, tmp_path)


def test_a_missing_package_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="'laws': the package wandb is not installed; expected"):
        WeightsAndBiases("laws", "abc", {}, tmp_path / "wandb")
    assert not (tmp_path / "wandb").exists()
