"""Do weights, activations and cache act independently, by channel and tensor, and by block?"""

import pandas as pd

from launch.studies.answer import Answer, between
from launch.studies.rows import Study, alone, integers, lines_of, with_plain
from qat import laws
from qat.analysis.independence import Independence, independence
from qat.policy import Policy
from qat.report import law_figures


def answer(study: Study) -> Answer:
    """Both factorials, and blocks against channels width by width."""
    rows = study.grid(study.trained)
    blocks = rows[rows.policy.map(_scaled_by_blocks)]
    factorials = {"channel and tensor": integers(rows)}
    if not blocks.empty:
        factorials["blocks"] = pd.concat([rows[rows.policy == "none"], blocks])
    tables, figures = {}, {}
    for name, table in factorials.items():
        tested = independence(laws.as_table(table), resamples=study.resamples, starts=study.starts)
        tables[f"Scales of {name}: {_verdict(tested)}"] = _settings(tested)
        figures[f"independence_{name.replace(' ', '_')}"] = law_figures.factors(tested.settings)
    tables["What weights of few bits add, a scale a channel or a block of 8, nats per byte"] = (
        _granularities(rows, blocks)
    )
    return Answer(tables, figures)


def _scaled_by_blocks(policy: str) -> bool:
    """Whether whatever is quantized of weights and activations has a scale for every block."""
    parsed = Policy.parse(policy)
    operands = (parsed.weights, parsed.activations)
    quantized = [each for each in operands if each is not None and each.quantizes]
    return bool(quantized) and all(each.granularity == "block" for each in quantized)


def _verdict(tested: Independence) -> str:
    broken = tested.settings[tested.settings.breaks]
    return f"p = {tested.p_value:.3g}, {len(broken)} of {len(tested.settings)} settings differ"


def _settings(tested: Independence) -> pd.DataFrame:
    """The settings that break, and the strongest of the others."""
    order = (tested.settings.factor - 1).abs().sort_values(ascending=False).index
    shown = (
        tested.settings.loc[order].sort_values("breaks", ascending=False, kind="stable").head(12)
    )
    return pd.DataFrame(
        {
            "weights": int(row["weight_bits"]),
            "activations": int(row["activation_bits"]),
            "cache": int(row["kv_bits"]),
            "factor on N_eff": between(row["factor"], row["low"], row["high"]),
            "nats it adds": row["excess"],
            "differs": bool(row["breaks"]),
        }
        for row in lines_of(shown)
    )


def _granularities(rows: pd.DataFrame, blocks: pd.DataFrame) -> pd.DataFrame:
    added = with_plain(alone(rows, "weight_bits"))
    cell = ["params", "tokens", "seed", "weight_bits"]
    both = integers(added).merge(
        added[added.run_id.isin(blocks.run_id)], on=cell, suffixes=("_channel", "_block")
    )
    table = both[["params", "tokens", "weight_bits", "delta_channel", "delta_block"]]
    table = table.groupby(["params", "tokens", "weight_bits"], as_index=False).mean()
    names = {"params": "N", "tokens": "D", "weight_bits": "bits"}
    names |= {"delta_channel": "channel", "delta_block": "block"}
    return table.rename(columns=names)
