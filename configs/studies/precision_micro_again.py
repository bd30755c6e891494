"""Some runs of the study's grid a second time: do they reproduce?

Command: python -m launch.sweep --sweep=configs/studies/precision_micro_again.py \
    --workdir=runs/precision_micro_again
Cost: 5 runs; not measured yet.
Expected: every loss within 3 standard errors of its first.
"""

import dataclasses

from configs.studies import precision_micro
from qat.sweep import Sweep, subsample

COUNT = 5


def get_sweep() -> Sweep:
    """A random sample of the grid, drawn by content."""
    study = precision_micro.get_sweep()
    return dataclasses.replace(study, grid=subsample(study.grid, COUNT, seed=COUNT))
