"""A sweep of the shape of Kumar et al.'s, *Scaling Laws for Precision* (arXiv 2411.04330).

Command: python -m launch.sweep --sweep=configs/sweeps/paper.py --workdir=runs/paper
Cost: 465 runs of 4 shapes, 4,681,488 million tokens, 4.6e21 FLOPs, 16082 device-hours of TPU v5e
at an assumed 40% of its bfloat16 peak, evaluations included; 2354 roundings.
Expected: not measured by anybody with this code. The paper fits its law to 465 runs with an R² of
0.97 for rounding after training; configs/paper.py says how the set-up differs.

The paper has 4 sizes, 5 budgets, and 3 to 12 bits in weights, activations and cache, each alone and
several together; it leaves out 3 bits of activations or of the cache, whose training is unstable.
Which 465 of these it trained it does not say. The rule here: the 20 unquantized runs, and of all
others, alone, weights with activations, and all three at the same bits, a random 445, drawn by
content. So a larger COUNT adds runs to those of a smaller one. Every budget is a cosine of its own.

It rounds weights by GPTQ, and in an appendix to the nearest; here it is to the nearest.
"""

from configs import paper, paper_30m, paper_60m, paper_110m, paper_220m
from qat.policy import Policy
from qat.sweep import Grid, Overrides, Sweep, axis, chain, product, subsample, where, zipped

COUNT = 465
SIZES = (paper_220m, paper_110m, paper_60m, paper_30m)
SHAPE = ("width", "layers", "heads", "kv_heads", "mlp_width")
TOGETHER = ("w{0}", "a{0}", "kv{0}", "w{0}a{0}", "w{0}a{0}kv{0}")
BITS = range(3, 13)
UNSTABLE = 3  # bits of activations or cache
PTQ_BITS = (3, 4, 5, 6, 7, 8)


def get_sweep() -> Sweep:
    """The sweep; unquantized runs first, then the others, both from the longest on."""
    policies = [operands.format(bits) for operands in TOGETHER for bits in BITS]
    unquantized = product(_cells(), axis("policy", ["none"]))
    quantized = where(product(_cells(), axis("policy", policies)), _is_stable)
    return Sweep(
        config=paper_30m.get_config().to_dict(),
        grid=chain(unquantized, subsample(quantized, COUNT - len(unquantized))),
        ptq_methods=("rtn",),
        ptq_formats=tuple(f"int{bits}/channel" for bits in PTQ_BITS),
    )


def _cells() -> Grid:
    """Budgets and sizes."""
    models = [size.get_config().model for size in SIZES]
    sizes = zipped(*(axis(f"model.{key}", [model[key] for model in models]) for key in SHAPE))
    return product(axis("tokens", paper.TOKENS[::-1]), sizes)


def _is_stable(run: Overrides) -> bool:
    policy = Policy.parse(run["policy"])
    return min(policy.bits("activations"), policy.bits("kv_cache")) > UNSTABLE
