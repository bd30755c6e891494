"""Policies and quantizers as pytrees carry anything, and are written whatever they hold."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import qat.nnx
import qat.storage
from qat.policy import Policy, Rules
from qat.quantization import quantize
from qat.quantizer import Quantizer

TRACED = Policy(
    "int4/channel", Quantizer("int8", scale="fixed", value=3.0), gradients="e5m2/token/stochastic"
).traced()
TREES = {
    "policy": TRACED,
    "quantizer": TRACED.activations,
    "rules": Rules([("head", None), (".*", TRACED)]),
    "QTensor": quantize(jnp.ones((4, 2)), "int4/channel/zero_point", axis=0),
    "PackedTensor": quantize(jnp.ones((4, 2)), "nvfp4/block:2", axis=0).pack(),
}


def is_none(leaf):
    return leaf is None


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
@pytest.mark.parametrize("leaf", [None, "x", 3, object(), jax.ShapeDtypeStruct((2,), jnp.int8)])
def test_a_tree_holds_any_leaf(tree, leaf):
    mapped = jax.tree.map(lambda _: leaf, tree, is_leaf=is_none)
    assert type(mapped) is type(tree)
    assert set(jax.tree.leaves(mapped, is_leaf=is_none)) == {leaf}
    assert str(mapped) and repr(mapped)
    values = jax.tree.leaves(tree, is_leaf=is_none)
    restored = jax.tree.unflatten(jax.tree.structure(mapped, is_leaf=is_none), values)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, restored, tree)


def test_paths_name_the_fields():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(TRACED)]
    assert paths == [
        ".weights.format.numbers",
        ".activations.format.numbers",
        ".activations.value",
        ".gradients.format.numbers",
    ]


def test_structure_is_compared_and_hashed():
    same, other = Policy.parse("w2a3").traced(), Policy.parse("w2a3, native")
    assert jax.tree.structure(Policy.parse("we4m3").traced()) == jax.tree.structure(same)
    assert hash(jax.tree.structure(same)) != hash(jax.tree.structure(other))
    traces = []
    run = jax.jit(lambda policy: traces.append(1) or policy.weights.grid.max_value)
    assert [run(Policy.parse(text).traced()) for text in ("w4", "w8", "none")] == [7, 127, np.inf]
    assert len(traces) == 1


def test_long_reprs_are_short():
    stored = quantize(jnp.ones((64, 32)), "int3/channel", axis=0)
    assert repr(stored) == "QTensor(int3, shape=(64, 32), scales=(1, 32), dtype=float32)"
    assert repr(stored.pack()) == "PackedTensor(int3, shape=(64, 32), dtype=float32)"


def model(seed):
    layers = [nnx.Linear(4, 4, rngs=nnx.Rngs(seed)), nnx.relu, nnx.Linear(4, 3, rngs=nnx.Rngs(1))]
    policy = Policy("int4/channel", "int8/fixed", kv_cache="int4/token")
    converted, _ = qat.nnx.quantize_model(nnx.Sequential(*layers), policy)
    return converted


def test_orbax_saves_the_state_of_a_converted_model(tmp_path):
    saved, other = model(0), model(5)
    qat.nnx.calibrate(saved, [jnp.ones((2, 4))])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(saved))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", nnx.state(other))
    nnx.update(other, restored)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4)), jnp.float32)
    np.testing.assert_array_equal(other(x), saved(x))


def test_storage_saves_a_converted_model_without_its_policies(tmp_path):
    saved, other = model(0), model(5)
    qat.nnx.calibrate(saved, [jnp.ones((2, 4))])
    with pytest.raises(TypeError, match=r"is Policy: .* nnx\.Not\(qat\.nnx\.PolicyState\)"):
        qat.storage.save(tmp_path / "m.safetensors", nnx.to_pure_dict(nnx.state(saved)))
    numbers = nnx.Not(qat.nnx.PolicyState)
    path = tmp_path / "model.safetensors"
    qat.storage.save(path, nnx.to_pure_dict(nnx.state(saved, numbers)))
    state = nnx.state(other, numbers)
    nnx.replace_by_pure_dict(state, qat.storage.load(path))
    nnx.update(other, state)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4)), jnp.float32)
    np.testing.assert_array_equal(other(x), saved(x))
