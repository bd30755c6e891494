"""The paper's experiment at a thousandth of its scale: parameters × tokens × bits on real English.

Command: python -m launch.sweep --sweep=configs/studies/precision_micro.py \
    --workdir=runs/precision_micro
Cost: not measured yet.
Expected: docs/studies/precision_micro.

Six sizes that differ in width alone, from 3 to 93 thousand parameters; 0.5 to 48 million bytes of
text, none of it read twice; every size at its own best learning rate, see
configs/studies/precision_micro_rates.py. The design of Kumar et al. (arXiv 2411.04330), with more
runs at few bits and many tokens per parameter, where effects exceed the scatter of seeds, and with
what they left open: replicates, a whole factorial of operands, once with a scale for every channel
and tensor and once for every block of eight, formats of equal bits, ternary weights, and mixtures
of experts. Runs of a size and seed share initialisation and data order, so precisions are compared
in pairs.

Every run is rounded at its end, to the nearest and by GPTQ, to fewer bits than it had.
"""

import itertools
from collections.abc import Iterable

from configs.studies import precision_micro_rates as tuning
from qat.policy import Policy
from qat.sweep import Grid, Sweep, axis, chain, product, zipped

WIDTHS = tuning.WIDTHS  # 92,960 51,280 23,440 12,968 6,352 3,316 parameters
# 8e-3 · sqrt(92,960 / N): by parabolas through the tuned runs, within 0.004 nats of the best rate
# of every size at 2 million tokens but the smallest, 0.023 there, and 0.022 at 0.5 and 8 million.
RATES = {64: 8e-3, 48: 1.1e-2, 32: 1.6e-2, 24: 2.1e-2, 16: 3e-2, 12: 4.2e-2}
MILLION = 1_000_000
PTQ_BITS = tuning.PTQ_BITS

LOW = ("w1", "w2", "w3", "w4", "a2", "a3", "a4", "kv1", "kv2", "kv3")
HIGH = (
    "a1",
    "kv4",
    *(f"{operand}{bits}" for operand in ("w", "a", "kv") for bits in (5, 6, 7, 8, 12)),
)
FORMATS = (
    *("e2m0", "e3m0", "e4m1", "e3m2", "e4m2", "e5m2", "e5m6"),  # the paper's, 3 to 8 and 12 bits
    *("e2m1", "e1m2", "e2m3", "e1m4", "e4m3", "e3m4", "e2m5"),  # others of 4, 6 and 8 bits
)
BLOCK = 8
OPERAND_BITS = ((16, 4, 3, 2), (16, 4, 3, 2), (16, 3, 2))  # weights, activations, cache


def get_sweep() -> Sweep:
    """The sweep, part after part."""
    return Sweep(
        config=tuning.get_config().to_dict(),
        grid=chain(*parts().values()),
        ptq_methods=("rtn", "gptq"),
        ptq_formats=tuple(f"int{bits}/channel" for bits in PTQ_BITS),
    )


def parts() -> dict[str, Grid]:
    """The runs by the question they are for; no run is in two parts."""
    policies = ("none", *LOW)
    return {
        "noise": runs((16, 32), (0.5, 2, 8), ("none", "w2", "w3", "a3", "kv2"), seeds=(1, 2)),
        "budgets": runs(WIDTHS, (8, 2, 0.5), policies),
        "factorial": runs((16,), (2,), factorial(), seeds=(0, 1)),
        "block factorial": runs((16,), (2,), block_factorial(), seeds=(0, 1)),
        "large factorial": runs((32,), (2,), factorial()),
        "blocks": runs((64, 32, 16), (8, 2), [f"{each}g{BLOCK}" for each in LOW[:4]]),
        "ternary": runs((48, 32, 16), (8, 2, 0.5), ("wternary", "bitnet")),
        "between": runs(WIDTHS, (4, 1), ("none", "w2", "w3", "a3", "kv2")),
        "formats": runs((32, 16), (2,), [f"{x}{each}" for each in FORMATS for x in ("w", "a")]),
        "many bits": runs((32, 24, 16), (2,), HIGH),
        "long": runs(WIDTHS, (16,), ("none", "w2", "w3", "w4")),
        "longer": runs((64, 48, 32), (32,), ("none", "w2", "w3", "w4")),
        "longest": runs((64,), (48,), ("none", "w3")),
        "experts": product(experts(), runs((32, 16), (8, 2, 0.5), ("none", *LOW[:4]))),
        "large noise": runs((64,), (2,), ("none", "w2", "w3", "a3", "kv2"), seeds=(1, 2)),
    }


def runs(
    widths: Iterable[int],
    millions: Iterable[float],
    policies: Iterable[str],
    seeds: Iterable[int] = (0,),
) -> Grid:
    """Every policy at every seed, budget and size, each size at its rate."""
    sizes = zipped(
        axis("model.width", widths), axis("learning_rate", [RATES[width] for width in widths])
    )
    tokens = axis("tokens", [round(budget * MILLION) for budget in millions])
    return product(axis("seed", seeds), tokens, sizes, axis("policy", policies))


def experts() -> Grid:
    """Mixtures of four, of which a token passes through one or two."""
    return product(axis("model.experts", (4,)), axis("model.experts_per_token", (1, 2)))


def factorial() -> list[str]:
    """Weights × activations × cache of two and more quantized operands."""
    combinations = itertools.product(*OPERAND_BITS)
    return [
        str(Policy.parse(f"w{w}a{a}kv{kv}"))
        for w, a, kv in combinations
        if sum(bits < 16 for bits in (w, a, kv)) > 1
    ]


def block_factorial() -> list[str]:
    """Weights × activations, alone and together, with a scale for every block."""
    weights, activations, _ = OPERAND_BITS
    spelled = [
        ", ".join(
            f"{operand} int{bits}/block:{BLOCK}"
            for operand, bits in (("weights", w), ("activations", a))
            if bits < 16
        )
        for w, a in itertools.product(weights, activations)
    ]
    return [str(Policy.parse(policy)) for policy in spelled if policy]
