"""Which law do the rows prefer: criteria of the fit and of prediction, and a verdict if they agree.

AICc and BIC weigh how well a law describes the rows against its parameters; ordered hold-outs ask
how it predicts rows farther out than those it saw. They fail in different ways: the criteria trust
that residuals are noise, a hold-out rests on a few rows. On public runs of 1 and 2 bits the doubt
between forms exceeds that of sampling, so a law is named only where no criterion speaks against it,
and otherwise the numbers that matter are shown as each remaining law has them.

Every criterion admits the laws it cannot tell from its best: within 2 of the best AICc, within 2 of
the best BIC, and on held-out rows not worse by more than half of the best error or by more than two
standard errors of the paired difference (by run). Half, because all held-out rows share the errors
of the fitted parameters, which the paired difference does not see. The verdict is what all admit.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qat.laws.fit import fit
from qat.laws.forms import get_law
from qat.laws.holdout import ORDERED, predicted_apart
from qat.laws.law import Law
from qat.laws.likelihood import log_likelihood, overdispersion
from qat.laws.record import Fit
from qat.laws.table import Table, as_table
from qat.laws.uncertainty import runs_of

# Arrays end in their axes: R rows.
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_ADMITTED = 2.0  # of AICc and BIC above the best; and standard errors of a held-out difference
_LEAST_STARTS = 32  # of fits that leave rows out, which have a quarter of the others'
_AS_GOOD = 1.5  # times the best root mean square of held-out rows


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Laws on one table.

    Attributes:
        fits: of the whole table, by name of the law.
        table: a row for each law: ``parameters``, ``aicc`` and ``bic`` above the best, ``r2`` and
            for each hold-out the root mean square of the log residual of held-out rows.
        admitted: by criterion, the laws it cannot tell from its best.
        not_held_out: by hold-out that could not be made, why.
        held_out: by hold-out, log residuals of the laws, in the table's order, shape (L, R): NaN
            for rows that were fitted, infinite for those a law cannot predict.
    """

    fits: dict[str, Fit]
    table: pd.DataFrame
    admitted: dict[str, tuple[str, ...]]
    not_held_out: dict[str, str]
    held_out: dict[str, Floats]

    @property
    def remaining(self) -> tuple[str, ...]:
        """The laws that every criterion admits, those with fewer parameters first."""
        names = [n for n in self.fits if all(n in found for found in self.admitted.values())]
        order = self.table.set_index("law")
        return tuple(sorted(names, key=lambda n: (order.parameters[n], order.bic[n])))

    @property
    def preferred(self) -> str | None:
        """The remaining law of fewest parameters, None where the criteria contradict."""
        return next(iter(self.remaining), None)

    @property
    def verdict(self) -> str:
        """One line: the law, or why there is none."""
        if len(self.remaining) == 1:
            return f"{self.preferred}: no criterion speaks against it ({', '.join(self.admitted)})"
        if self.remaining:
            names = ", ".join(self.remaining)
            return f"not told apart: {names}; {self.preferred} has fewest parameters"
        leaders = "; ".join(f"{name} admits {', '.join(x)}" for name, x in self.admitted.items())
        return f"no verdict, the criteria disagree: {leaders}"

    def intervals(self) -> pd.DataFrame:
        """Values and intervals of the parameters that at least two laws share, a row for each."""
        names = list(self.remaining) or list(self.fits)
        counted = [name for law in names for name in self.fits[law].law.names]
        shared = [name for name in dict.fromkeys(counted) if counted.count(name) > 1]
        found = [
            (parameter, law, self.fits[law].params[parameter], *self.fits[law].interval(parameter))
            for parameter, law in itertools.product(shared, names)
            if parameter in self.fits[law].law.names
        ]
        return pd.DataFrame(found, columns=["parameter", "law", "value", "low", "high"])


def compare(
    laws: Sequence[str | Law],
    table: Table | pd.DataFrame,
    *,
    holdout: str | Sequence[str] = ORDERED,
    loss: str = "huber",
    delta: float = 1e-3,
    bootstrap: int = 200,
    starts: int = 256,
    seed: int = 0,
    on_fit: Callable[[], None] = lambda: None,
) -> Comparison:
    """Compares laws on a table.

    Args:
        laws: names or laws, at least two.
        table: runs as `fit` takes them.
        holdout: one or more of "largest-params", "largest-compute", "lowest-bits",
            "longest-ratio" and "each:COLUMN"; () for none. One that the table has no values for is
            left out, and the comparison says so.
        loss: as of `fit`, and all that follow.
        delta: of Huber's function.
        bootstrap: resamples of the fits to the whole table.
        starts: of every fit.
        seed: of everything.
        on_fit: called after each fit: one a law, and one a law, hold-out and fold.

    Raises:
        ValueError: for fewer than two laws, an unknown name, or as `fit` does.
    """
    known = {law.name: law for law in map(get_law, laws)}
    if len(known) < 2:
        raise ValueError(f"a comparison needs at least two laws, not {', '.join(known) or 'none'}")
    table = as_table(table)

    def fitted(law: Law, rows: Table, resamples: int) -> Fit:
        some = starts if resamples else max(_LEAST_STARTS, starts // 4)
        found = fit(law, rows, loss=loss, delta=delta, bootstrap=resamples, starts=some, seed=seed)
        on_fit()
        return found

    fits = {name: fitted(law, table, bootstrap) for name, law in known.items()}
    rows = _criteria(list(fits.values()), table)
    admitted = {kind: tuple(rows.law[rows[kind] <= _ADMITTED]) for kind in ("aicc", "bic")}
    again = [functools.partial(fitted, law, resamples=0) for law in known.values()]
    held, impossible = predicted_apart(holdout, table, again)
    for kind, error_LR in held.items():
        if np.isinf(error_LR).any(axis=1).all():
            impossible[kind] = f"hold-out {kind!r}: no law predicts all of these rows"
            continue
        rows[kind] = np.sqrt(np.nanmean(error_LR**2, axis=1))
        admitted[kind] = tuple(rows.law[_not_worse(error_LR, runs_of(table))])
    return Comparison(fits, rows, admitted, impossible, held)


def _criteria(fits: Sequence[Fit], table: Table) -> pd.DataFrame:
    """A row for each fit with AICc and BIC above the best; infinite if a row is outside the law.

    The scale of residuals is a parameter more; twice the log likelihood is divided by the
    overdispersion that the likeliest law has.
    """
    delta, count = fits[0].settings.threshold, len(table)
    log_loss_R, ones_R = np.log(table.columns(["loss"])["loss"]), np.ones(count)
    residuals = [np.log(each.predict(table)) - log_loss_R for each in fits]
    best_L = np.full(len(fits), -np.inf)
    for law, residual_R in enumerate(residuals):
        if np.isfinite(residual_R).all():
            best_L[law], _ = log_likelihood(residual_R, ones_R, delta)
    twice_L = -2 * best_L
    if np.isfinite(best_L).any():
        twice_L /= overdispersion(residuals[int(best_L.argmax())], ones_R, delta)
    rows = []
    for fitted, twice in zip(fits, twice_L, strict=True):
        parameters = fitted.diagnostics.parameters + 1
        spare = count - parameters - 1
        small = 2 * parameters * (parameters + 1) / spare if spare > 0 else np.inf
        row = {"law": fitted.law.name, "parameters": fitted.diagnostics.parameters}
        row |= {"aicc": twice + 2 * parameters + small, "bic": twice + parameters * np.log(count)}
        rows.append(row | {"r2": fitted.diagnostics.r2})
    frame = pd.DataFrame(rows)
    for kind in ("aicc", "bic"):
        frame[kind] -= frame[kind].min() if np.isfinite(frame[kind].min()) else 0.0
    return frame


def _not_worse(error_LR: Floats, run_R: NDArray[np.intp]) -> Bools:
    """Which laws predict no worse than the best, by more than chance, shape (L,)."""
    held_R = ~np.isnan(error_LR[0])
    square_LR, run_R = error_LR[:, held_R] ** 2, run_R[held_R]
    mean_L = square_LR.mean(axis=1)
    best = int(mean_L.argmin())
    if np.isinf(mean_L[best]):
        return np.ones(len(mean_L), bool)
    chosen_L: Bools = mean_L <= _AS_GOOD**2 * mean_L[best]
    for law in np.flatnonzero(np.isfinite(mean_L) & ~chosen_L):
        worse_R = square_LR[law] - square_LR[best]
        by_run = np.bincount(run_R, worse_R - worse_R.mean())
        chosen_L[law] = worse_R.mean() <= _ADMITTED * np.sqrt(by_run @ by_run) / len(worse_R)
    return chosen_L
