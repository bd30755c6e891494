"""Placement by rule, and everything a rule refuses."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from qat.training.sharding import make_mesh, state_shardings

AXES = (("up/kernel", ("width", "mlp")), ("down/kernel", ("mlp", "width")))


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_parameters_and_moments_are_placed_by_the_same_rule():
    mesh = make_mesh(2, 2, 2)
    params = {"up": {"kernel": shape(8, 16), "bias": shape(16)}, "down": {"kernel": shape(16, 8)}}
    placed = state_shardings({"params": params, "opt": (None, {"mu": params})}, mesh, AXES)
    assert placed["params"]["up"]["kernel"].spec == PartitionSpec("fsdp", "tensor")
    assert placed["params"]["down"]["kernel"].spec == PartitionSpec("tensor", "fsdp")
    assert placed["params"]["up"]["bias"].spec == PartitionSpec()
    assert placed["opt"][1]["mu"] == placed["params"]


@pytest.mark.parametrize(
    ("state", "axes", "message"),
    [
        ({"other": {"kernel": shape(8, 8)}}, AXES, "no sharding rule matches .*other/kernel"),
        ({"up": {"kernel": shape(8, 8, 8)}}, AXES, "does not fit 'up/kernel'"),
        ({"up": {"kernel": shape(7, 8)}}, AXES, "size 7, 'width', is not a .* fsdp = 2"),
        ({"k": shape(8, 8)}, (("k", ("width", "width")),), "used twice"),
    ],
)
def test_what_does_not_fit_is_an_error(state, axes, message):
    with pytest.raises(ValueError, match=message):
        state_shardings(state, make_mesh(2, 2, 2), axes)


def test_a_rule_matches_whole_path_parts_only():
    with pytest.raises(ValueError, match="no sharding rule"):
        state_shardings({"groundup": {"kernel": shape(8, 8)}}, make_mesh(2, 2, 2), AXES)


def test_axes_between_others_are_as_many_as_there_are():
    axes = (("kernel", ("layer", ..., "width", "mlp")),)
    expected = {(2, 8, 8): ("fsdp", "tensor"), (2, 3, 5, 8, 8): (None, None, "fsdp", "tensor")}
    for sizes, spec in expected.items():
        placed = state_shardings({"kernel": shape(*sizes)}, make_mesh(2, 2, 2), axes)
        assert placed["kernel"].spec == PartitionSpec(None, *spec)
    with pytest.raises(ValueError, match="does not fit 'kernel'"):
        state_shardings({"kernel": shape(8, 8)}, make_mesh(2, 2, 2), axes)


def test_mesh_takes_what_is_left_and_refuses_what_does_not_divide():
    assert make_mesh(-1, 2, 2).shape == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(ValueError, match="needs 3 devices, there are 8"):
        make_mesh(1, 1, 3)
