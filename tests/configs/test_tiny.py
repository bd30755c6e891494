"""The number that the tiny config promises, as `launch.train` prints it."""

import functools
import re
import sys
from pathlib import Path

import jax
import pytest

from configs import tiny
from launch import training
from launch.lab import Lab
from qat.training.results import read_rows

pytestmark = pytest.mark.usefixtures("optimized")

STDLIB = pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the text is Python 3.11's")


@STDLIB
def test_the_tiny_config_keeps_its_promise(tmp_path, monkeypatch):
    promised = re.search(r"validation loss ([\d.]+) ± ([\d.]+)", tiny.__doc__)
    expected, error = map(float, promised.groups())
    config = tiny.get_config().to_dict()
    monkeypatch.setattr(training, "Lab", functools.partial(Lab, devices=jax.devices()[:1]))
    saving, watching = training.Saving(0, 1, 0), training.Watching(False, None, None, False)
    assert training.run(config, tmp_path / "run", Path(tmp_path / "data"), saving, watching) == 0
    row = read_rows(tmp_path / "run").iloc[0]
    assert row.loss == pytest.approx(expected, abs=0.02)
    assert row.loss_se == pytest.approx(error, abs=0.002)
