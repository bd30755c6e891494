"""Of formats with equal bits, which costs least, and does the error of rounding say so?"""

from launch.studies.answer import Answer
from launch.studies.rows import Study, alone, some, with_plain
from qat.analysis.format_columns import gaussian_error
from qat.formats import parse_format


def answer(study: Study) -> Answer:
    """What every format adds, of weights and of activations alone."""
    rows = study.grid(study.trained)
    floats = some(rows[rows.weight_format.str.match("e[0-9]")], "floats")
    cells = floats[["params", "tokens", "seed"]]
    added = with_plain(rows.merge(cells.drop_duplicates()))
    plain = ~added.policy.str.contains("/|ternary|bitnet|g8")
    tables = {}
    for operand, bits in (("weights", "weight_bits"), ("activations", "activation_bits")):
        own = alone(added[plain], bits)
        column = bits.replace("_bits", "_format")
        own = own[own[column] != "none"]
        wide = own.pivot_table(index=column, columns="params", values="delta")
        wide.columns = [f"N = {params:,}" for params in wide.columns]
        wide = wide.reset_index(names="format")
        wide.insert(0, "bits", [parse_format(name).bits for name in wide.format])
        wide["error of normal values"] = [gaussian_error(name) for name in wide.format]
        wide = wide.sort_values(["bits", "error of normal values"])
        tables[f"What formats of {operand} add, nats per byte"] = wide
    return Answer(tables)
