"""What is quantized: a trained model as `launch.checkpoints` opens it, and its own result row."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from launch.checkpoints import UNKNOWN, Checkpoint, open_checkpoint
from models.task import model_of
from models.transformer import Transformer, TransformerConfig, split
from qat.policy import Policy
from qat.training.results import UNQUANTIZED_BITS, Row, package_versions


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A trained model.

    Attributes:
        checkpoint: the model.
        row: its result; the numbers of an evaluation in it are to be replaced.
    """

    checkpoint: Checkpoint
    row: Row

    @property
    def config(self) -> TransformerConfig:
        """The shape."""
        return self.checkpoint.config

    @property
    def policy(self) -> Policy:
        """What the model quantizes as it was trained."""
        return self.checkpoint.policy

    def model(self, policy: Policy | None) -> Transformer:
        """The model at a policy's precision; learned scales it has no use for are left out."""
        shapes = jax.eval_shape(lambda: split(_built(self.config, policy))[1])
        params = _picked(shapes, self.checkpoint.params)
        return model_of(self.config, policy, jax.tree.map(jnp.asarray, params))

    @functools.cached_property
    def size(self) -> int:
        """How many parameters there are, with embedding and head; one that is both counts once."""
        params = self.checkpoint.params
        embedding, head = params["embed"]["embedding"], params["head"]["kernel"]
        twice: int = head.size if np.array_equal(embedding.T, head) else 0
        count: int = sum(leaf.size for leaf in jax.tree.leaves(params))
        return count - twice


def open_subject(folder: Path) -> Subject:
    """Opens a finished run, or a model that was converted.

    Raises:
        OSError, ValueError: as `open_checkpoint`; or the run diverged or is not finished.
    """
    checkpoint = open_checkpoint(folder)
    if checkpoint.experiment is None:
        return Subject(checkpoint, _row_of_converted(checkpoint))
    if checkpoint.row is None or checkpoint.row.status != "ok":
        found = "has no result yet" if checkpoint.row is None else checkpoint.row.status
        raise ValueError(f"checkpoint {str(folder)!r}: its run {found}; expected a finished one")
    return Subject(checkpoint, checkpoint.row)


def _row_of_converted(checkpoint: Checkpoint) -> Row:
    """Of a model that somebody else trained, on nobody knows how many tokens."""
    return Row(
        run_id=checkpoint.identity,
        params=checkpoint.config.params,
        tokens=0,
        weight_bits=UNQUANTIZED_BITS,
        activation_bits=UNQUANTIZED_BITS,
        kv_bits=UNQUANTIZED_BITS,
        weight_format="none",
        activation_format="none",
        kv_format="none",
        policy="none",
        eval_set="none",
        loss=0.0,
        loss_se=0.0,
        seed=0,
        learning_rate=0.0,
        schedule=UNKNOWN,
        flops=0.0,
        status="ok",
        wall_s=0.0,
        data_fingerprint=UNKNOWN,
        config_hash=UNKNOWN,
        versions=package_versions(),
    )


def _built(config: TransformerConfig, policy: Policy | None) -> Transformer:
    return Transformer(config, policy, rngs=nnx.Rngs(0))


def _picked(shapes: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that a model has, of those there are."""
    return {
        name: _picked(shape, params[name]) if isinstance(shape, Mapping) else params[name]
        for name, shape in shapes.items()
    }
