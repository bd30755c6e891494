"""A whole sweep through Slurm on two nodes."""

import pandas as pd
import pytest

from tests.launch.conftest import corpus
from tests.launch.test_sweep import data_dir, sweep, sweep_file, table_of, undisturbed

__all__ = ["corpus", "data_dir", "sweep_file", "undisturbed"]  # fixtures
pytestmark = pytest.mark.slurm


def test_two_nodes_give_the_table_of_one_machine(
    cluster, undisturbed, sweep_file, data_dir, tmp_path
):
    flags = ("--executor=slurm", "--workers=2", "--slurm=minutes=30", "--slurm=partition=normal")
    done = sweep(sweep_file(), tmp_path / "run", data_dir, *flags)
    assert done.returncode == 0, done.stderr + done.stdout
    assert len(list((tmp_path / "run" / "slurm").rglob("*.exit"))) == 2
    pd.testing.assert_frame_equal(table_of(tmp_path / "run"), table_of(undisturbed), rtol=1e-5)
