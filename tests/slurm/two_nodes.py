"""One of the processes of a command on two nodes, for test_slurm.py: adds up their numbers."""

import sys

from absl import flags

from launch import distributed


def main():
    distributed.start()
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    total = multihost_utils.process_allgather(np.int32(jax.process_index() + 1)).sum()
    print(f"{jax.process_count()} processes, sum {total}", flush=True)


if __name__ == "__main__":
    flags.FLAGS(sys.argv)
    main()
