"""What the tests of training share: a small model, batches to learn from, and a whole run."""

import jax
import numpy as np

from models.task import constants_for, language_model
from models.transformer import TransformerConfig
from qat.policy import Policy
from qat.training.loop import train
from qat.training.optimizer import adamw
from qat.training.schedule import warmup_cosine
from qat.training.sharding import make_mesh
from qat.training.step import make_programs

CONFIG = TransformerConfig(vocabulary=32, width=16, layers=2, heads=4, kv_heads=2)
STRUCTURE = Policy.parse("none")


def batch_at(step):
    """A noisy walk over the vocabulary: predictable enough to learn in 30 steps."""
    rng = np.random.default_rng(step)
    start_B1 = rng.integers(0, 32, (8, 1))
    walk_BS = start_B1 + np.cumsum(rng.integers(1, 3, (8, 17)), axis=1)
    return (walk_BS % 32).astype(np.int32)


class Walks:
    """As many batches as asked for."""

    shape = (8, 17)

    def __init__(self, count):
        self.count = count

    def batch_at(self, step, rows=slice(None)):
        return batch_at(step)[rows]

    def __len__(self):
        return self.count


BATCHES = Walks(10**6)


def programs_on(mesh, config=CONFIG, **options):
    return make_programs(language_model(config, STRUCTURE), adamw(), mesh, **options)


def programs_on_one_device(**options):
    return programs_on(make_mesh(devices=jax.devices()[:1]), **options)


def constants(policy="none", config=CONFIG):
    return constants_for(config, Policy.parse(policy))


def abstract(programs):
    return jax.eval_shape(programs.init_state, np.uint32(0))


def run(programs, policy="none", steps=30, peak=1e-2, seed=0, state=None, config=CONFIG, **options):
    return train(
        programs,
        programs.init_state(np.uint32(seed)) if state is None else state,
        constants(policy, config),
        options.pop("schedule", warmup_cosine(peak, steps)),
        options.pop("batches", BATCHES),
        **{"log_every": 10, **options},
    )


def assert_same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
