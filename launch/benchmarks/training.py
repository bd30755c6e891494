"""The suite "training": how near training comes to the machine's own matrix product.

The yardstick is a float32 product of two square matrices, timed in the same run; a train step's
rate is its analytic FLOPs over its time. Every model is timed without a policy, with the formats
of no quantization, and with int8 weights and activations. The model "deep" has 48 layers so
narrow that its step is nothing but the host's work and the device's launches.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch import timing
from launch.progress import Meter
from models.task import constants_for, language_model, matrix_params
from models.transformer import TransformerConfig
from qat.policy import Policy
from qat.training import flops
from qat.training.optimizer import adamw
from qat.training.schedule import warmup_cosine
from qat.training.sharding import make_mesh
from qat.training.step import make_programs

Row = dict[str, Any]

VOCABULARY = 256
MATRIX = 1024  # side of the yardstick
POLICIES = (None, "none", "w8a8")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and the batch it is trained on.

    Attributes:
        model: its shape.
        batch: sequences.
        tokens: of a sequence.
    """

    model: TransformerConfig
    batch: int
    tokens: int

    @property
    def flops(self) -> int:
        """Of one train step."""
        model = self.model
        return flops.train_flops(
            self.batch * self.tokens, matrix_params(model), model.layers, model.width, self.tokens
        )


def _shape(width: int, layers: int, heads: int, kv_heads: int, batch: int, tokens: int) -> Shape:
    model = TransformerConfig(VOCABULARY, width, layers, heads, kv_heads, unroll=8)
    return Shape(model, batch, tokens)


SHAPES = {
    "micro": _shape(32, 2, 2, 1, batch=32, tokens=128),
    "small": _shape(128, 4, 4, 4, batch=16, tokens=128),
    "large": _shape(384, 6, 6, 6, batch=8, tokens=256),
    "deep": _shape(8, 48, 2, 1, batch=1, tokens=8),
}


def run(shapes: Sequence[str], rounds: int) -> list[Row]:
    """Measures and prints.

    Args:
        shapes: names in `SHAPES`.
        rounds: how often each program is timed.

    Returns:
        A row for each shape and policy.
    """
    rows: list[Row] = [{"model": "yardstick", "policy": "-", "flops": 2 * MATRIX**3}]
    calls: list[Callable[[], Any]] = [_matrix_product()]
    pairs = [(name, policy) for name in shapes for policy in POLICIES]
    with Meter("Compiling", len(pairs), "models") as meter:
        for name, policy in pairs:
            shape = SHAPES[name]
            rows.append(
                {
                    "model": name,
                    "policy": "no policy" if policy is None else policy,
                    "params": shape.model.params,
                    "flops": shape.flops,
                }
            )
            calls.append(_train_step(shape, policy))
            meter.advance(1)
    with Meter("Timing", rounds, "rounds") as meter:
        seconds_RP = timing.take_turns(calls, rounds, on_round=lambda: meter.advance(1))
    for row, call, seconds_R in zip(rows, calls, seconds_RP.T, strict=True):
        plain_R = seconds_RP[:, _plain(rows, row)]
        row["host_ms"] = 1e3 * float(np.median([_until_return(call) for _ in range(rounds)]))
        row["ms"] = 1e3 * float(np.median(seconds_R))
        row["gflops_per_s"] = row["flops"] / row["ms"] / 1e6
        share_R = row["flops"] / seconds_R / (rows[0]["flops"] / seconds_RP[:, 0])
        row["share_of_product"] = float(np.median(share_R))
        row["ratio_to_plain"] = timing.ratio(seconds_R, plain_R).median
    print(f"\n{_table(rows)}")
    return rows


def _until_return(call: Callable[[], Any]) -> float:
    """Seconds that the host is busy with a call, whose work the device then does on its own."""
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    jax.block_until_ready(result)
    return seconds


def _plain(rows: Sequence[Row], row: Row) -> int:
    """Index of the row of the same model without a policy."""
    return next(i for i, other in enumerate(rows) if other["model"] == row["model"])


def _matrix_product() -> Callable[[], jax.Array]:
    matrix = jax.random.normal(jax.random.key(0), (MATRIX, MATRIX))
    product = jax.jit(jnp.matmul)
    return lambda: product(matrix, matrix)


def _train_step(shape: Shape, name: str | None) -> Callable[[], Any]:
    """A call that trains one step."""
    policy = None if name is None else Policy.parse(name)
    task = language_model(shape.model, policy)
    programs = make_programs(task, adamw(), make_mesh(devices=jax.devices()[:1]))
    state = programs.init_state(jnp.uint32(0))
    constants, schedule = constants_for(shape.model, policy), warmup_cosine(1e-3, 1000)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (shape.batch, shape.tokens + 1))
    tokens_BS = ids.astype(np.int32)

    def step() -> Any:
        nonlocal state
        batch = jax.device_put(tokens_BS, programs.batch_sharding)
        state, metrics = programs.train_step(state, constants, schedule, batch)
        return state, metrics

    jax.block_until_ready(step())
    return step


def _table(rows: Sequence[Row]) -> str:
    head = ("model", "policy", "params", "step ms", "host ms", "GFLOP/s", "of product", "to plain")
    lines = [
        (
            row["model"],
            row["policy"],
            f"{row['params']:,}" if "params" in row else "",
            f"{row['ms']:.2f}",
            f"{row['host_ms']:.2f}",
            f"{row['gflops_per_s']:.1f}",
            f"{row['share_of_product']:.3f}",
            f"{row['ratio_to_plain']:.3f}",
        )
        for row in rows
    ]
    return timing.table(head, lines, text_columns=2)
