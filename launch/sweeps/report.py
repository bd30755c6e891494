"""The budget of a sweep, for people."""

from launch.sweeps.budget import Budget, ShapeBudget, peak_of
from launch.sweeps.calibration import Calibration
from launch.timing import table

_IDLE = 0.9  # share of a core that a worker gets on a machine that does nothing else


def report(budget: Budget, most: int = 20) -> str:
    """A budget as text.

    Args:
        budget: of a sweep.
        most: shapes to list, the dearest first; the others are one line together.
    """
    parts = [_totals(budget), _shapes(budget, most), _here(budget), _accelerators(budget)]
    return "\n\n".join("\n".join(part) for part in parts)


def _totals(budget: Budget) -> list[str]:
    shapes, total = budget.shapes, budget.total
    flops = total("train_flops") + total("eval_flops")
    return [
        f"runs         {total('runs'):,} of {len(shapes):,} shapes; "
        f"{total('rows'):,} rows, {total('ptq_evaluations'):,} of them quantized after training",
        f"programs     {total('programs'):,} train steps and evaluations, compiled "
        f"{total('compiles'):,} times if all {budget.workers} workers meet all shapes",
        f"training     {total('tokens'):,} tokens, {total('train_flops'):.3e} FLOPs",
        f"evaluation   {total('rows'):,} times, at most {total('eval_flops'):.3e} FLOPs "
        f"({total('eval_flops') / flops:.0%} of all)",
    ]


def _shapes(budget: Budget, most: int) -> list[str]:
    head = ["policy structure", "params", "runs", "tokens", "FLOPs", "share", "hours, all workers"]
    listed, others = budget.shapes[:most], budget.shapes[most:]
    rows = [_row(budget, each.structure, f"{each.params:,}", [each]) for each in listed]
    if others:
        rows.append(_row(budget, f"{len(others):,} cheaper shapes", "", others))
    return table(head, rows, text_columns=1).splitlines()


def _row(
    budget: Budget, name: str, params: str, shapes: list[ShapeBudget] | tuple[ShapeBudget, ...]
) -> list[str]:
    """A line about shapes; their hours are those with all workers at work."""
    flops = sum(each.flops for each in shapes)
    seconds = sum(each.worker_s or 0.0 for each in shapes)
    share = flops / (budget.total("train_flops") + budget.total("eval_flops"))
    return [
        name,
        params,
        f"{sum(each.runs for each in shapes):,}",
        f"{sum(each.tokens for each in shapes):,}",
        f"{flops:.2e}",
        f"{share:.1%}",
        _short(seconds / budget.workers / 3600) if budget.calibration else "-",
    ]


def _here(budget: Budget) -> list[str]:
    if budget.calibration is None or budget.hours_here is None:
        return ["this machine was not timed"]
    return [
        f"this machine {_spelled(budget.hours_here)} with {budget.workers} workers",
        *_calibration(budget.calibration),
    ]


def _calibration(calibration: Calibration) -> list[str]:
    rates = ", ".join(
        f"{probe.flops / probe.step_s / 1e9:.1f} GFLOP/s at {probe.flops:.1e} FLOPs a step"
        f"{' (cut)' if probe.cut else ''}"
        for probe in calibration.probes
    )
    busy = " (too many workers, or a busy machine)" if calibration.core_share < _IDLE else ""
    doubt = [
        "  steps too dear to be timed were cut down, which makes them slower for their FLOPs: the",
        "  hours are an upper bound, perhaps ten times too many",
    ]
    return [
        f"  timed for {calibration.seconds:.0f} s, {calibration.workers} workers at once, each: "
        f"{rates}",
        f"  every worker had {calibration.core_share:.0%} of a core{busy}",
        "  with imports, compilation and evaluations, without preparing text, checkpoints and",
        "  restarts: expect a factor of 1.5 for shapes like those timed, if the machine stays as",
        "  busy as it was; 2 to 3 for others",
        *(doubt if any(probe.cut for probe in calibration.probes) else []),
    ]


def _accelerators(budget: Budget) -> list[str]:
    money = budget.money
    head = ["accelerator", "peak TFLOP/s", f"hours on {budget.chips}", "chip hours"]
    rows = [
        [name, f"{peak_of(name) / 1e12:.0f}", _short(hours / budget.chips), _short(hours)]
        for name, hours in budget.chip_hours.items()
    ]
    if money:
        head.append("money")
        rows = [[*row, f"{money[row[0]]:,.2f}" if row[0] in money else "-"] for row in rows]
    return [
        *table(head, rows, text_columns=1).splitlines(),
        f"assuming {budget.utilisation:.0%} of the bfloat16 peak, which models of less than some "
        "hundred million parameters do not reach",
    ]


def _spelled(hours: float) -> str:
    """With a unit that suits."""
    return f"{_short(hours)} hours" if hours >= 1 else f"{_short(60 * hours)} minutes"


def _short(hours: float) -> str:
    """Three digits."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
