"""Nested containers of arrays in one .safetensors file or an orbax directory.

Both hold the same: arrays under names such as "layers/0/w.codes", which other programs can read,
and one JSON text that says what they are: dtype, shape and checksum of every array, and the tree
with the quantization of each tensor. Formats are stored by their numbers and levels, not by name,
so a user's own survives. Whatever is damaged is refused.

What is written appears beside its place and is renamed, so it is there whole or not at all.
Everything happens in one process on whole arrays; the state of a run on many hosts is the
business of its checkpoints.
"""

import dataclasses
import json
import math
import os
import tempfile
import textwrap
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np

from qat.formats import Format
from qat.quantization import QTensor
from qat.storage.packed import PackedTensor, pack

Arrays = dict[str, np.ndarray]

_VERSION = 1
_META, _ARRAYS = "qat", "arrays"  # what the JSON text and the arrays are called
_RESERVED = "__metadata__"  # where safetensors keeps the text
_ROOT = "value"  # the name of an array that is in no container
_PARTS = ("codes", "scale", "tensor_scale", "zero_point")  # of a PackedTensor
_PLAIN = (  # dtypes that every reader of a file knows; others are written as bytes
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64"),
)


def save(path: str | os.PathLike[str], tree: Any, overwrite: bool = False) -> None:
    """Writes a tree to a file or directory that appears whole or not at all.

    Args:
        path: one file where it ends in ".safetensors", else an orbax directory. Missing parent
            folders are made.
        tree: dicts (with text or integers as keys), lists and tuples of arrays, `QTensor`,
            `PackedTensor`, None, numbers and text. A `QTensor` is packed on the way.
        overwrite: whether to replace a file, or a directory that `save` wrote.

    Raises:
        FileExistsError: the path exists and `overwrite` is not set, or it is a directory that
            `save` did not write.
        TypeError: the tree holds something else; the message says where.
        ValueError: two arrays would have one name.
    """
    path = Path(path).absolute()
    _require_free(path, overwrite)
    arrays: Arrays = {}
    described = _described(tree, "", arrays)
    table = {name: _entry(array) for name, array in arrays.items()}
    content = {"version": _VERSION, "arrays": table, "tree": described}
    description = {**content, "crc32": _text_checksum(content)}
    stored = {
        name: array if array.dtype.name in _PLAIN else _bytes(array)
        for name, array in arrays.items()
        if array.size  # orbax takes no empty ones, and their shape says all
    }
    write = _write_file if path.suffix == ".safetensors" else _write_directory
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        new = Path(folder, path.name)
        write(new, description, stored)
        if path.exists() and (path.is_dir() or new.is_dir()):  # one move replaces only files
            path.rename(Path(folder, f"{path.name}.replaced"))
        new.replace(path)


def load(path: str | os.PathLike[str]) -> Any:
    """Reads what `save` wrote.

    Quantized arrays come back as `PackedTensor`, whatever they were (`unpack` gives the
    `QTensor`); others as JAX arrays, but as NumPy where JAX would narrow them, as it does with
    64-bit numbers by default.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: `save` did not write it, or it is damaged.
    """
    path = Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: expected what qat.storage.save wrote")
    try:
        description, stored = (_read_directory if path.is_dir() else _read_file)(path)
        checksum = description.pop("crc32")
        if description["version"] != _VERSION:
            raise ValueError(f"it has version {description['version']}")
        if checksum != _text_checksum(description):
            raise ValueError("its description is damaged")
        table = description["arrays"].items()
        arrays = {name: _restored_array(name, entry, stored) for name, entry in table}
        return _restored(description["tree"], arrays)
    except Exception as error:  # readers raise anything where bytes are not what they expect
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")
        raise ValueError(
            f"{path}: expected what qat.storage.save wrote, whole and of version {_VERSION}; "
            f"{reason}"
        ) from error


def _require_free(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists: choose another path, or overwrite=True")
    if path.is_dir() and not (path / _META).is_dir():
        raise FileExistsError(f"{path} is a directory that qat.storage.save did not write")


def _described(node: Any, name: str, arrays: Arrays) -> dict[str, Any]:
    """What the text says of a tree; its arrays are added to `arrays`."""
    if isinstance(node, Mapping):
        _require_keys(node, name)
        items = [[k, _described(child, _joined(name, k), arrays)] for k, child in node.items()]
        return {"dict": items}
    if type(node) in (list, tuple):
        children = [_described(child, _joined(name, i), arrays) for i, child in enumerate(node)]
        return {type(node).__name__: children}
    if node is None or type(node) in (bool, int, float, str):
        return {"value": node}
    name = name or _ROOT
    if isinstance(node, QTensor):
        node = pack(node)
    if not isinstance(node, PackedTensor):
        return {"array": _added(node, name, arrays)}
    fields = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    parts = {part: _added(fields[part], f"{name}.{part}", arrays) for part in _PARTS}
    return {"packed": {**fields, **parts, "format": dataclasses.asdict(node.format)}}


def _restored(node: dict[str, Any], arrays: Mapping[str, Any]) -> Any:
    """The tree that `_described` described."""
    ((kind, content),) = node.items()
    if kind == "dict":
        return {key: _restored(child, arrays) for key, child in content}
    if kind in ("list", "tuple"):
        children = [_restored(child, arrays) for child in content]
        return children if kind == "list" else tuple(children)
    if kind == "value":
        return content
    if kind == "array":
        return arrays[content]
    if kind != "packed":
        raise ValueError(f"it holds a {kind!r}")
    parts = {part: name and arrays[name] for part, name in content.items() if part in _PARTS}
    tuples = {key: tuple(content[key]) for key in ("tile", "shape")}
    return PackedTensor(**{**content, **parts, **tuples, "format": _format(content["format"])})


def _format(fields: dict[str, Any]) -> Format:
    levels = fields["levels"]
    return Format(**{**fields, "levels": None if levels is None else tuple(levels)})


def _joined(name: str, key: str | int) -> str:
    return f"{name}/{key}" if name else str(key)


def _require_keys(node: Mapping[Any, Any], name: str) -> None:
    for key in node:
        if type(key) not in (str, int):
            raise TypeError(f"{name or 'tree'}: keys are text or integers, got {key!r}")


def _added(value: Any, name: str, arrays: Arrays) -> str | None:
    """The name of an array that is now among `arrays`; None for None."""
    if value is None:
        return None
    dtype = getattr(value, "dtype", None)
    if dtype is None or not any(jnp.issubdtype(dtype, kind) for kind in (jnp.number, jnp.bool)):
        raise TypeError(
            f"{name} is {type(value).__name__}{f' of {dtype}' if dtype else ''}: expected arrays "
            "of numbers, QTensor, PackedTensor, None, numbers or text, in dicts, lists and tuples; "
            "of an NNX model nnx.to_pure_dict(nnx.state(model, nnx.Not(qat.nnx.PolicyState)))"
        )
    if name in arrays or name == _RESERVED:
        raise ValueError(f"an array cannot be called {name!r}, which is the name of another")
    array = np.asarray(value, order="C")
    arrays[name] = array.astype(jnp.dtype(array.dtype.name), copy=False)  # native byte order
    return name


def _bytes(array: np.ndarray) -> np.ndarray:
    """The array's memory, flat."""
    return array.reshape(-1).view(np.uint8)


def _entry(array: np.ndarray) -> dict[str, Any]:
    checksum = zlib.crc32(_bytes(array).data)
    return {"dtype": array.dtype.name, "shape": list(array.shape), "crc32": checksum}


def _text_checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _restored_array(name: str, entry: dict[str, Any], stored: Arrays) -> Any:
    """An array as it was; JAX's where JAX has its dtype.

    It leaves `stored`, lest a large tree be in memory twice.
    """
    dtype, shape = jnp.dtype(entry["dtype"]), tuple(entry["shape"])
    array = stored.pop(name) if math.prod(shape) else np.zeros(shape, dtype)
    if dtype.name not in _PLAIN:
        array = array.view(dtype).reshape(shape)
    if _entry(array) != entry:
        raise ValueError(f"array {name!r} is damaged")
    return jnp.asarray(array) if jax.dtypes.canonicalize_dtype(dtype) == dtype else array


def _write_file(path: Path, description: dict[str, Any], stored: Arrays) -> None:
    from safetensors.numpy import save_file

    save_file(stored, path, metadata={_META: json.dumps(description)})


def _read_file(path: Path) -> tuple[dict[str, Any], Arrays]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        description = json.loads(file.metadata()[_META])
        return description, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _write_directory(path: Path, description: dict[str, Any], stored: Arrays) -> None:
    import orbax.checkpoint as ocp

    items = {_META: ocp.args.JsonSave(description)}
    if stored:
        items[_ARRAYS] = ocp.args.PyTreeSave({_key(name): stored[name] for name in stored})
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, ocp.args.Composite(**items))


def _read_directory(path: Path) -> tuple[dict[str, Any], Arrays]:
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        meta = ocp.args.Composite(**{_META: ocp.args.JsonRestore()})
        description = checkpointer.restore(path, meta)[_META]
        names = [name for name, entry in description["arrays"].items() if math.prod(entry["shape"])]
        if not names:
            return description, {}
        as_numpy = {_key(name): ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        items = ocp.args.Composite(**{_ARRAYS: ocp.args.PyTreeRestore(restore_args=as_numpy)})
        stored = checkpointer.restore(path, items)[_ARRAYS]
        return description, {name: stored[_key(name)] for name in names}


def _key(name: str) -> str:
    """A name for orbax, where an array called "a/0" would overwrite part of one called "a"."""
    return quote(name, safe="")
