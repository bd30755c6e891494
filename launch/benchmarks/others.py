"""Qwix and AQT in the layer benchmark, each used as its own documentation shows.

Both are optional, so they are imported where they are used.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax

from launch.benchmarks.contenders import (
    BLOCK,
    COUNTED_BITS,
    NF4_BLOCK,
    Contender,
    Library,
    MissingSchemeError,
    linen_contender,
)
from launch.benchmarks.models import Workload

_QWIX_RULES: dict[str, dict[str, Any]] = {
    "w8a8": {"weight_qtype": "int8", "act_qtype": "int8"},
    "w4a8": {"weight_qtype": "int4", "act_qtype": "int8"},
    "w3a8": {"weight_qtype": "int3", "act_qtype": "int8"},
    "e4m3": {"weight_qtype": "float8_e4m3fn", "act_qtype": "float8_e4m3fn"},
    "block128": {"weight_qtype": "int4", "act_qtype": "int8", "tile_size": BLOCK},
    "nf4": {"weight_qtype": "nf4", "tile_size": NF4_BLOCK},
    "sr": {"weight_qtype": "int8", "act_qtype": "int8"},
    "sr-element": {"weight_qtype": "int8", "act_qtype": "int8"},
}
_QWIX_GRADIENTS: dict[str, dict[str, Any]] = {
    "sr": {"bwd_qtype": "int8", "bwd_stochastic_rounding": "uniform"},
    "sr-element": {
        "bwd_qtype": "int8",
        "bwd_stochastic_rounding": "uniform",
        "channelwise_noise_axes": (0, 1, 2),
    },
}


def _qwix(workload: Workload, scheme: str) -> Contender:
    return _qwix_contender(workload, _QWIX_RULES[scheme], _QWIX_GRADIENTS.get(scheme, {}))


def _qwix_of_bits(workload: Workload) -> Iterator[Contender]:
    for bits in COUNTED_BITS:
        rule = {"weight_qtype": f"int{bits}", "act_qtype": "int8"}
        yield _qwix_contender(workload, rule, {})


def _qwix_contender(
    workload: Workload, rule: dict[str, Any], gradients: dict[str, Any]
) -> Contender:
    import qwix

    plain = workload.linen(None)
    where = {"module_path": workload.quantized, "op_names": ("dot_general",)}
    training = qwix.QtRule(**where, **rule, **gradients)
    model = qwix.quantize_model(plain, qwix.QtProvider([training]))

    def weight_bytes(params: Any) -> int:
        provider = qwix.PtqProvider([qwix.QuantizationRule(**where, **rule)])
        served = qwix.quantize_model(plain, provider)
        inputs, _ = workload.batch()
        shapes = jax.eval_shape(served.init, jax.random.key(0), inputs)["params"]
        stored = jax.tree.leaves(
            qwix.quantize_params(params, shapes), is_leaf=lambda node: isinstance(node, qwix.QArray)
        )
        return _nbytes([kernel for kernel in stored if isinstance(kernel, qwix.QArray)])

    rng = "stochastic_rounding" if gradients else None
    return linen_contender(workload, model, rng, weight_bytes)


def _aqt(workload: Workload, scheme: str) -> Contender:
    from aqt.jax.v2 import config as aqt_config

    if scheme == "nf4":
        raise MissingSchemeError("AQT has no codebook formats")
    if scheme == "e4m3":
        return _aqt_contender(workload, aqt_config.config_fwd_fp8("e4m3"))
    if scheme == "sr":
        # This config rounds gradients stochastically and all else to nearest.
        config = aqt_config.config_v4(fwd_bits=8, dlhs_bits=8, drhs_bits=8)
        return _aqt_contender(workload, config, noisy=True)
    bits = {"w8a8": 8, "w4a8": 4, "w3a8": 3, "block128": 4}[scheme]
    tiling = _aqt_tiling if scheme == "block128" else None
    return _aqt_contender(workload, _aqt_forward(bits), tiling=tiling)


def _aqt_of_bits(workload: Workload) -> Iterator[Contender]:
    for bits in COUNTED_BITS:
        yield _aqt_contender(workload, _aqt_forward(bits))


def _aqt_forward(weight_bits: int) -> Any:
    """AQT's config for int8 activations, integer weights and unquantized gradients."""
    from aqt.jax.v2 import config as aqt_config

    config = aqt_config.config_v4(fwd_bits=8, dlhs_bits=None, drhs_bits=None)
    aqt_config.set_bits(config, 8, weight_bits, None, None, None, None)
    aqt_config.set_stochastic_rounding(config, False, False, "jax.uniform")
    return config


def _aqt_tiling(lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any) -> Any:
    """AQT's description of blocks along the contraction axis of both operands."""
    del lhs, rhs
    from aqt.jax.v2 import tiled_dot_general as tiled

    def blocks(axis: int) -> Any:
        axes = [tiled.AxisTiling(axis=axis, tile_size=BLOCK)]
        return tiled.TensorTiling(contraction_axes=axes, remaining_axes=[])

    ((lhs_axis,), (rhs_axis,)), _ = dimension_numbers
    return tiled.Cfg(lhs=blocks(lhs_axis), rhs=blocks(rhs_axis))


def _aqt_contender(
    workload: Workload, config: Any, tiling: Any = None, noisy: bool = False
) -> Contender:
    from aqt.jax.v2.flax import aqt_flax
    from aqt.jax.v2.utils import QuantMode

    rng = "params" if noisy else None
    dot_general = functools.partial(
        aqt_flax.AqtDotGeneral, config, prng_name=rng, tiling_fn=tiling, use_legacy_freezer=False
    )

    def weight_bytes(params: Any) -> int:
        converting = functools.partial(
            dot_general,
            rhs_quant_mode=QuantMode.CONVERT,
            rhs_freeze_mode=aqt_flax.FreezerMode.CALIBRATION_AND_VALUE,
        )
        inputs, _ = workload.batch()
        rngs = {"params": jax.random.key(0)}
        model = workload.linen(converting)
        _, stored = model.apply({"params": params}, inputs, rngs=rngs, mutable=True)
        return _nbytes(stored["aqt"])

    return linen_contender(workload, workload.linen(dot_general), rng, weight_bytes)


def _nbytes(tree: Any) -> int:
    """Memory of all arrays in a tree."""
    return sum(int(leaf.nbytes) for leaf in jax.tree.leaves(tree))


QWIX = Library("qwix", "flax linen", "qwix", _qwix, _qwix_of_bits)
AQT = Library("aqt", "flax linen", "aqt", _aqt, _aqt_of_bits)
