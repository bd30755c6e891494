"""Does a cache of few bits cost more the longer the context is?"""

from launch.studies.answer import Answer
from launch.studies.rows import Study
from qat.report import figures

_PART = r"\[(\d+):(\d+)\]$"


def answer(study: Study) -> Answer:
    """What rounding the cache adds in each part of the context, by bits."""
    rows = study.table("positions")
    rows = rows[(rows.ptq_method != "none") & rows.eval_set.str.contains(_PART)]
    parts = rows.eval_set.str.extract(_PART).astype(int)
    rows = rows.assign(
        start=parts[0], stop=parts[1], format=rows.ptq_kv_cache.str.split("/").str[0]
    )
    table = rows.assign(positions=parts[0].astype(str) + "–" + (parts[1] - 1).astype(str))
    order = table[["positions", "start"]].drop_duplicates().sort_values("start").positions
    wide = table.pivot_table(
        index=["params", "tokens", "format"], columns="positions", values="ptq_delta"
    )
    wide = wide[list(order)].reset_index().rename(columns={"params": "N", "tokens": "D"})
    most = rows[rows.params == rows.params.max()]
    most = most[most.tokens == most.tokens.max()].rename(
        columns={"ptq_delta": "delta", "ptq_delta_se": "delta_se"}
    )
    return Answer(
        tables={"Added by rounding the cache, by position in the context, nats per byte": wide},
        figures={"cache_by_position": figures.added_by_position(most)},
    )
