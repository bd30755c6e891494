"""Which learning rate is best at each size, and what does the rule that the grid follows cost?"""

from launch.studies.answer import Answer
from launch.studies.rows import Study, some


def answer(study: Study) -> Answer:
    """Losses by rate, and the rate that the grid takes."""
    rows = study.trained
    tried = rows[(rows.learning_rate != rows.params.map(study.rates)) & (rows.policy == "none")]
    tried = tried[(tried.schedule == "cosine") & (tried.experts == 0)]
    wide = some(tried, "tuned rates").pivot_table(
        index=["params", "tokens"], columns="learning_rate", values="loss"
    )
    table = wide.rename(columns="{:g}".format).reset_index()
    table["rate of the grid"] = table.params.map(study.rates)
    table = table.rename(columns={"params": "N", "tokens": "D"})
    return Answer(tables={"Validation loss at each learning rate, nats per byte": table})
