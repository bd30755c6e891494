"""A user's model as post-training quantization sees it, whichever library it is from."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
from flax import nnx

from qat.ptq.linen_model import LinenModel
from qat.ptq.model import Model
from qat.ptq.nnx_model import NnxModel
from qat.spelling import expected_instead


def _call(model: Any, batch: Any) -> Any:
    return model(batch)


def model_of(
    model: Any, call: Callable[[Any, Any], Any] | None = None, example: Any = None
) -> Model:
    """The model behind the protocol.

    Args:
        model: an NNX module or a pair (Linen module, variables).
        call: (model, batch) → anything, how a batch runs; None is ``model(batch)``.
        example: a batch, for a Linen model that is to be traced.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(model, nnx.Module):
        return NnxModel(model, call or _call)
    pair = model if isinstance(model, tuple) and len(model) == 2 else (None, None)
    if isinstance(pair[0], nn.Module) and isinstance(pair[1], Mapping):
        return LinenModel(pair[0], pair[1], call or _call, example)
    raise ValueError(
        expected_instead("model", "an NNX module or a pair (Linen module, variables)", model)
    )
