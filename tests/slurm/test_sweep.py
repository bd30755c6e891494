"""A whole sweep through Slurm on two nodes."""

import pandas as pd
import pytest

from tests.launch.conftest import corpus
from tests.launch.test_sweep import data_dir, sweep, sweep_file, table_of, undisturbed

__all__ = ["corpus", "data_dir", "sweep_file", "undisturbed"]  # fixtures
pytestmark = pytest.mark.slurm


@pytest.mark.parametrize(
    ("flags", "jobs", "atol"),
    # Two processes a run add in another order; a difference of losses keeps the whole error.
    [(("--workers=2",), 2, 1e-8), (("--slurm=nodes=2",), 1, 1e-6)],
)
def test_two_nodes_give_the_table_of_one_machine(
    cluster, undisturbed, sweep_file, data_dir, tmp_path, flags, jobs, atol
):
    flags = ("--executor=slurm", "--slurm=minutes=30", "--slurm=partition=normal", *flags)
    done = sweep(sweep_file(), tmp_path / "run", data_dir, *flags)
    assert done.returncode == 0, done.stderr + done.stdout
    assert len(list((tmp_path / "run" / "slurm").rglob("*.exit"))) == jobs
    found, expected = table_of(tmp_path / "run"), table_of(undisturbed)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-5, atol=atol)
