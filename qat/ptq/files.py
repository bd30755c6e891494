"""A quantized model on disk: codes at their true size, and the changes of inputs they belong to.

Codes alone say what a layer multiplies; where inputs are scaled, rotated or partly kept exact, they
mean nothing without that. Both are kept in one file or directory of `qat.storage`, with what else
the model has (statistics of batches, calibrated ranges), and put into a model that its code has
made anew. Random keys and what calls leave behind, such as caches, stay that model's own.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qat import storage
from qat.ptq.adapters import model_of
from qat.ptq.model import Model
from qat.ptq.report import ParameterReport
from qat.rotation import Rotation
from qat.spelling import nearest
from qat.transforms import InputTransform, Rotating, Scaling, Step


def save(
    path: str | os.PathLike[str],
    model: Any,
    report: Sequence[ParameterReport],
    overwrite: bool = False,
) -> None:
    """Writes what `quantize` returned.

    Args:
        path: as in `qat.storage.save`.
        model: the quantized model, an NNX module or a pair (Linen module, variables).
        report: of it.
        overwrite: as in `qat.storage.save`.

    Raises:
        ValueError: the report is of another model.
        OSError: it cannot be written.
    """
    subject = model_of(model)
    if sorted(subject.parameters) != sorted(line.path for line in report):
        raise ValueError("the report is of another model: expected what quantize returned with it")
    changed = ((line.path, subject.transform(line.path)) for line in report if line.quantized)
    content = {
        "parameters": {
            line.path: subject.parameters[line.path] if line.stored is None else line.stored
            for line in report
        },
        "exact": {
            line.path: _sparse(line.exact_rows) for line in report if line.exact_rows is not None
        },
        "transforms": {name: _spelled(each) for name, each in changed if each is not None},
        "cache_seed": subject.cache_seed,
        "others": subject.others,
    }
    storage.save(path, content, overwrite)


def load(path: str | os.PathLike[str], model: Any) -> Any:
    """Puts what `save` wrote into a model, which then computes what the saved one did, bit for bit.

    Args:
        path: as in `qat.storage.load`.
        model: of the same code, with any values in its weights; it stays as it is.

    Returns:
        A copy, a module or a pair as `model` was.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is something else or damaged; or the model has other variables, or
            transforms of its own.
    """
    content, subject = storage.load(path), model_of(model)
    if not isinstance(content, Mapping) or "cache_seed" not in content:
        raise ValueError(f"{path} holds something else: expected what qat.ptq.save wrote")
    stored = content["parameters"]
    subject = subject.without_quantizers(
        [name for name, value in stored.items() if isinstance(value, storage.PackedTensor)],
        ("weights",),
    )
    others = content.get("others", subject.others)  # older files have none
    _check_same(path, subject.parameters, stored)
    _check_same(path, subject.others, others)
    _check_made_anew(subject)
    subject = subject.with_transforms(
        {name: _restored(each) for name, each in content["transforms"].items()}
    )
    if content["cache_seed"] is not None:
        subject = subject.with_rotated_cache(content["cache_seed"])
    values = {name: _value(each, content["exact"].get(name)) for name, each in stored.items()}
    return subject.with_others(others).with_parameters(values).result


def _check_same(path: Any, own: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raises ValueError for variables that are not both here and there."""
    here, there = ({n: tuple(v.shape) for n, v in x.items()} for x in (own, stored))
    for name in [*there, *here]:
        if here.get(name) != there.get(name):
            near = f"; nearest is {nearest(name, here)!r}" if name not in here and here else ""
            raise ValueError(
                f"{path} is of another model: {name} is {there.get(name)} there, "
                f"{here.get(name)} here{near}"
            )


def _check_made_anew(subject: Model) -> None:
    """Raises ValueError where the transforms to come would follow others."""
    changed = [path for path in subject.parameters if subject.transform(path) is not None]
    if changed or subject.cache_seed is not None:
        where = changed[0] if changed else "the cache"
        raise ValueError(
            f"{where}: inputs are transformed already: expected a model that is made anew"
        )


def _value(stored: Any, exact: Mapping[str, jax.Array] | None) -> jax.Array:
    """The values of a parameter."""
    if not isinstance(stored, storage.PackedTensor):
        return jnp.asarray(stored)
    value = stored.dequantize()
    if exact is None:
        return value
    rows = jnp.zeros(value.size, exact["values"].dtype).at[exact["places"]].set(exact["values"])
    return value + rows.reshape(value.shape).astype(value.dtype)


def _sparse(rows: jax.Array) -> dict[str, np.ndarray]:
    """Values that are not 0, and where they are in the flat array."""
    flat = np.asarray(rows).reshape(-1)
    places = np.flatnonzero(flat).astype(np.int32)
    return {"places": places, "values": flat[places]}


def _spelled(transform: InputTransform) -> dict[str, Any]:
    """A transform as a tree of arrays."""
    return {"steps": [_spelled_step(step) for step in transform.steps], "exact": transform.exact_K}


def _spelled_step(step: Step) -> dict[str, Any]:
    if isinstance(step, Rotating):
        return {"signs": step.rotation.signs_K, "mix": step.rotation.mix_OO}
    if isinstance(step, Scaling):
        return {"scale": step.scale_K}
    raise ValueError(f"a step {type(step).__name__} has no place in files: expected those of qat")


def _restored(tree: Mapping[str, Any]) -> InputTransform:
    """The transform that `_spelled` spelled."""
    return InputTransform(tuple(map(_restored_step, tree["steps"])), tree["exact"])


def _restored_step(tree: Mapping[str, Any]) -> Step:
    if "scale" in tree:
        return Scaling(tree["scale"])
    return Rotating(Rotation(tree["signs"], tree["mix"]))
