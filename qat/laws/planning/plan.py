"""What to train with a budget: how large a model, on how much data, with how many bits.

The law's loss is minimised over size and bits, the bits of weights, activations and cache being
one number P, and the tokens are what the budget then pays for. Any law can be asked: only its loss
and its domain are evaluated. Every bootstrap draw has an optimum of its own, and their spread is
the interval.

Near an optimum the loss is flat, so the bare optimum says less than it seems: a plan also lists
what every bit width costs with its own best size, and the range of sizes that are as good within a
tolerance. An optimum at the end of what was searched is flagged, because it is none.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from qat.laws.planning.allocation import Allocations, Budget, Space, allocate
from qat.laws.planning.cost import TRAINING_BITS, Cost, get_cost
from qat.laws.planning.doubts import doubts, why_nothing
from qat.laws.planning.draws import Draws, Estimate, draws_of, estimate
from qat.laws.planning.setting import check_number, settled, shared_operands
from qat.laws.record import Fit
from qat.laws.table import UNQUANTIZED_BITS

# Arrays end in their axes: S parameter sets, W widths.
PARAMS_RANGE = (1e3, 1e18)
BITS_RANGE = (1.0, UNQUANTIZED_BITS)
SIZES = np.geomspace(1e-2, 1e2, 401)  # times the best size, where others are compared to it


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The best use of a budget under a fitted law.

    Attributes:
        law: its name.
        flops: the budget, FLOPs of bfloat16.
        operands: the columns that share the bits P.
        params: non-embedding parameters N*.
        tokens: training tokens D*.
        tokens_per_param: D*/N*.
        bits: P*, or the width that was asked for; None for a law that reads no bits.
        loss: nats per token.
        near_optimal: for each width its own best params, tokens and loss, the excess over ``loss``
            in nats with its interval, and whether that is within the tolerance; a width that the
            law does not allow has infinite loss. One row, 16, for a law that reads no bits.
        near_optimal_params: lowest and highest N, to 2%, whose loss, each with its own best bits,
            is within the tolerance; 0 and inf where that is beyond a hundredth or a hundredfold.
        tolerance: of the loss, relative.
        flags: what to know before believing it, one line each.
    """

    law: str
    flops: float
    operands: tuple[str, ...]
    params: Estimate
    tokens: Estimate
    tokens_per_param: Estimate
    bits: Estimate | None
    loss: Estimate
    near_optimal: pd.DataFrame
    near_optimal_params: tuple[float, float]
    tolerance: float
    flags: tuple[str, ...]

    def frame(self) -> pd.DataFrame:
        """One row a quantity, with the columns value, low, high."""
        names = ["params", "tokens", "tokens_per_param", "bits", "loss"]
        rows = {name: getattr(self, name) for name in names}
        known = {name: dataclasses.asdict(row) for name, row in rows.items() if row is not None}
        return pd.DataFrame.from_dict(known, orient="index")

    def lines(self) -> list[str]:
        """The plan for people."""
        low, high = self.near_optimal_params
        lines = [
            f"budget       {self.flops:.4g} FLOPs, law {self.law!r}",
            f"parameters   {self.params}",
            f"tokens       {self.tokens}, {self.tokens_per_param} a parameter",
            f"loss         {self.loss} nats per token",
            f"within {self.tolerance:.2%} of that loss",
        ]
        lines += [f"  parameters {low:.4g} to {high:.4g}"] if low < high else []
        if self.bits is not None:
            good = self.near_optimal["bits"][self.near_optimal["within_tolerance"]]
            lines.insert(3, f"bits         {self.bits} of {', '.join(self.operands)}")
            lines.append(f"  bits       {', '.join(f'{bits:g}' for bits in good) or 'none'}")
        return lines + [f"note: {flag}" for flag in self.flags]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def plan(
    fit: Fit,
    flops: float,
    *,
    params: float | None = None,
    bits: float | None = None,
    ptq_bits: float | None = None,
    inference_tokens: float = 0.0,
    cost: str | Cost = "linear",
    operands: Sequence[str] | None = None,
    tolerance: float = 1e-3,
    widths: Sequence[float] = range(1, 17),
    **columns: float,
) -> Plan:
    """The size, data and bits that give the lowest loss for a budget.

    Args:
        fit: of any law that reads params; see also `qat.laws.published`.
        flops: the budget, FLOPs of bfloat16.
        params: fixes N, non-embedding parameters.
        bits: fixes P.
        ptq_bits: bits to which the weights are rounded after training; the law must read them.
        inference_tokens: tokens the model will serve, with its rounded weights, out of the budget.
        cost: a name ("linear", "v5e", ...) or a `Cost`.
        operands: columns that share the bits P, of weight_bits, activation_bits and kv_bits: by
            default all that the law reads and the fit has data on.
        tolerance: relative excess loss that still counts as near the optimum.
        widths: bits that are compared with the optimum.
        **columns: values of what else the law reads, such as ``scale_group=128``, or bits of an
            operand that does not share P. Bits that are not given are 16.

    Returns:
        The plan, with the 95% percentile intervals of the fit's draws.

    Raises:
        ValueError: for a value out of range, a column that is missing or unknown, or a budget that
            does not pay for anything the law allows.
    """
    columns |= {} if ptq_bits is None else {"ptq_bits": ptq_bits}
    _check_numbers(flops, inference_tokens, tolerance, columns)
    draws = draws_of(fit)
    if not draws.law.whole:
        raise ValueError(f"law {draws.law.name!r} is what rounding adds, no loss to plan by")
    if "params" not in draws.law.columns:
        raise ValueError(f"law {draws.law.name!r} reads no params, so it cannot plan a size")
    tied = shared_operands(draws, operands, columns)
    fixed = settled(draws, columns, ("params", "tokens", *tied), TRAINING_BITS)
    budget = Budget(draws, get_cost(cost), tied, float(flops), float(inference_tokens), fixed)
    space = _space(draws, tied, params, bits, widths)
    by_width_WS, best = _optima(budget, space)
    if not np.isfinite(best.loss[0]):
        raise ValueError(why_nothing(budget, space))
    per_param = estimate(best.tokens / best.params)
    params_, tokens_, bits_, loss_ = (estimate(each_S) for each_S in best)
    return Plan(
        law=draws.law.name,
        flops=budget.flops,
        operands=tied,
        params=params_,
        tokens=tokens_,
        tokens_per_param=per_param,
        bits=bits_ if tied else None,
        loss=loss_,
        near_optimal=_near_optimal(space, by_width_WS, best, tolerance),
        near_optimal_params=_near_optimal_params(budget, space, best, tolerance),
        tolerance=tolerance,
        flags=tuple(doubts(fit, budget, space, best, columns)),
    )


def _check_numbers(
    flops: float, inference_tokens: float, tolerance: float, columns: Mapping[str, float]
) -> None:
    for name, value in columns.items():
        check_number(name, value)
    check_number("flops", flops, above=0)
    check_number("tolerance", tolerance, above=0)
    check_number("inference_tokens", inference_tokens)
    if inference_tokens < 0:
        raise ValueError(f"inference_tokens must not be negative, not {inference_tokens!r}")


def _space(
    draws: Draws,
    tied: Sequence[str],
    params: float | None,
    bits: float | None,
    widths: Sequence[float],
) -> Space:
    sizes, range_of_bits = PARAMS_RANGE, BITS_RANGE
    if params is not None:
        check_number("params", params, above=0)
        sizes = (float(params), float(params))
    if len(widths) == 0:
        raise ValueError("widths must hold a number of bits or more, not none")
    for width in widths:
        check_number("each of widths", width, 0, UNQUANTIZED_BITS)
    if not tied:
        range_of_bits, widths = (UNQUANTIZED_BITS, UNQUANTIZED_BITS), (UNQUANTIZED_BITS,)
    if bits is not None:
        if not tied:
            raise ValueError(
                f"bits = {bits} would have no effect: law {draws.law.name!r} reads none"
            )
        check_number("bits", bits, 0, UNQUANTIZED_BITS)
        range_of_bits, widths = (float(bits), float(bits)), (bits,)
    return Space(sizes, range_of_bits, tuple(map(float, widths)))


def _optima(budget: Budget, space: Space) -> tuple[Allocations, Allocations]:
    """The best of every width, shape (W, S), and the best of all, shape (S,).

    Where a chip's price jumps the optimum is the width at the jump itself, which a search of real
    numbers only approaches: so the widths compete with it, and win a tie.
    """
    count, sets_S = len(space.widths), np.arange(len(next(iter(budget.draws.values.values()))))
    widths_L = np.repeat(space.widths, len(sets_S))
    found = allocate(budget, sets_S, space.params, space.bits)
    at_widths = allocate(budget, np.tile(sets_S, count), space.params, (widths_L, widths_L))
    by_width_WS = Allocations(*(each_L.reshape(count, -1) for each_L in at_widths))
    rivals = [np.vstack(pair) for pair in zip(by_width_WS, found, strict=True)]
    winner_S = rivals[-1].argmin(axis=0)
    return by_width_WS, Allocations(*(each[winner_S, sets_S] for each in rivals))


def _near_optimal(
    space: Space, by_width_WS: Allocations, best: Allocations, tolerance: float
) -> pd.DataFrame:
    """A row a width: its own optimum, and what it costs over the best."""
    with np.errstate(invalid="ignore"):  # inf - inf, of a draw that allows nothing
        excess_WS = by_width_WS.loss - best.loss
    excess = [estimate(excess_S) for excess_S in excess_WS]
    frame = {
        "bits": np.asarray(space.widths),
        "params": by_width_WS.params[:, 0],
        "tokens": by_width_WS.tokens[:, 0],
        "loss": by_width_WS.loss[:, 0],
        "excess_loss": [each.value for each in excess],
        "excess_low": [each.low for each in excess],
        "excess_high": [each.high for each in excess],
        "within_tolerance": by_width_WS.loss[:, 0] <= (1 + tolerance) * best.loss[0],
    }
    return pd.DataFrame(frame)


def _near_optimal_params(
    budget: Budget, space: Space, best: Allocations, tolerance: float
) -> tuple[float, float]:
    """Lowest and highest N whose loss is within the tolerance, each with its own best bits."""
    if space.params[0] == space.params[1]:
        return space.params
    sizes = best.params[0] * SIZES
    found = allocate(budget, np.zeros(len(sizes), np.int64), (sizes, sizes), space.bits)
    good = [*sizes[found.loss <= (1 + tolerance) * best.loss[0]], best.params[0]]
    low, high = float(min(good)), float(max(good))
    return low if low > sizes[0] else 0.0, high if high < sizes[-1] else np.inf
