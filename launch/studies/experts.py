"""Are mixtures of experts more or less sensitive to the bits of their weights than dense models?"""

import pandas as pd

from launch.studies.answer import Answer, between
from launch.studies.rows import Study, alone, integers, some, with_plain
from qat import laws

_LAW = "precision_weibull_plain"


def answer(study: Study) -> Answer:
    """γ_w of dense models and of mixtures in the same cells, and what bits add to each."""
    rows = alone(integers(study.trained[study.trained.schedule == "cosine"]), "weight_bits")
    own_rate = (rows.learning_rate == rows.params.map(study.rates)) | (rows.experts > 0)
    rows = rows[own_rate & (rows.seed == 0)]
    sparse = some(rows[rows.experts > 0], "mixtures of experts")
    budgets, rates = sparse.tokens.unique(), sparse.learning_rate.unique()
    rows = rows[rows.tokens.isin(budgets) & rows.learning_rate.isin(rates)]
    rows = rows[rows.policy.isin(sparse.policy.unique())]
    fits, lines = {}, []
    for (experts, chosen), own in rows.groupby(["experts", "experts_per_token"]):
        name = "dense" if not experts else f"{experts} experts, top {chosen}"
        fitted = laws.fit(_LAW, own, bootstrap=study.resamples, starts=study.starts)
        fits[f"weights_of_{name.replace(',', '').replace(' ', '_')}"] = fitted
        known = {x: between(fitted.params[x], *fitted.interval(x)) for x in ("gamma_w", "k_w")}
        lines.append({"model": name, "runs": len(own)} | known | {"R²": fitted.diagnostics.r2})
    return Answer(
        tables={
            f"`{_LAW}` of the weights' bits": pd.DataFrame(lines),
            "What few bits of weights add, nats per byte": _added(rows),
        },
        fits=fits,
    )


def _added(rows: pd.DataFrame) -> pd.DataFrame:
    added = with_plain(rows)
    added = added[added.policy != "none"]
    wide = added.pivot_table(
        index=["experts", "experts_per_token", "params", "tokens"], columns="policy", values="delta"
    )
    names = {"experts_per_token": "per token", "params": "N", "tokens": "D"}
    return wide.reset_index().rename(columns=names)
