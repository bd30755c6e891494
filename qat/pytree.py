"""Frozen dataclasses as pytrees that hold whatever JAX puts into them.

JAX, and what is built on it, makes trees of shapes, names and sentinels in the structure of a tree
of arrays. A class that reads and checks what its callers give it must not do so then, so its
`__init__` is left out when leaves are put back.
"""

import dataclasses
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def register_unchecked(cls: type[T]) -> type[T]:
    """Registers a dataclass as a pytree; fields with ``metadata={"static": True}`` are structure.

    A decorator above that of the dataclass, which must have no slots.
    """
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    static = tuple(field.name for field in fields if field.metadata.get("static"))
    data = tuple(field.name for field in fields if field.name not in static)
    keys = tuple(map(jax.tree_util.GetAttrKey, data))

    def flatten(node: T) -> tuple[Any, Any]:
        value_of = vars(node).__getitem__
        return tuple(map(value_of, data)), tuple(map(value_of, static))

    def flatten_with_keys(node: T) -> tuple[Any, Any]:
        children, structure = flatten(node)
        return tuple(zip(keys, children, strict=True)), structure

    def unflatten(structure: Any, children: Any) -> T:
        node = object.__new__(cls)
        vars(node).update(zip(static, structure, strict=True))
        vars(node).update(zip(data, children, strict=True))
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
