"""The coordinate check of µP: do updates keep their size when a model gets wider?

    python -m launch.coordinates --config=configs/tiny.py --config.scaling.rule=mup
    python -m launch.coordinates --config=configs/tiny.py --config.policy=w4a8

Trains the config's model for a few steps at several widths, from the same rate, and measures by how
much each place's activations have changed since the start (root mean square, on the first
validation batch). A rule that transfers learning rates keeps that change the same at every width:
its exponent, the slope of log change over log width, is near zero in every place. Under the rule
"fixed" the logits' exponent is well above (Yang et al., arXiv 2203.03466, appendix D). The first
width is the base of the scaling rule.

Cost: about a minute on 2 cores.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from launch import timing
from launch.experiment import Experiment
from launch.lab import Lab
from launch.main import read_config, run
from launch.progress import Meter
from launch.widening import changes_of, exponents

config_flags.DEFINE_config_file("config", None, "Experiment to widen (required).")
_WIDTHS = flags.DEFINE_list("widths", ["32", "64", "128", "256"], "Widths; the first is the base.")
_STEPS = flags.DEFINE_integer("steps", 10, "Steps to train.", lower_bound=1)
_DATA_DIR = flags.DEFINE_string("data_dir", "runs/data", "Folder for prepared text.")


def main(argv: list[str]) -> None:
    """Trains at every width, prints changes and exponents."""
    del argv
    widths, config, lab = _widths(), read_config(), Lab(Path(_DATA_DIR.value))
    changes = []
    with Meter("Training", len(widths), "widths") as meter:
        for width in widths:
            config["model"]["width"] = width
            config["scaling"]["base_width"] = widths[0]
            config["scaling"]["base_heads"] = config["model"]["heads"]
            changes.append(changes_of(lab, Experiment.from_config(config), _STEPS.value))
            meter.advance(1)
    print(f"\nRoot mean square change after {_STEPS.value} steps\n\n{_table(widths, changes)}")


def _widths() -> list[int]:
    """Raises ValueError unless there are two widths or more, all different."""
    try:
        widths = [int(width) for width in _WIDTHS.value]
    except ValueError:
        widths = []
    if len(set(widths)) < max(2, len(_WIDTHS.value)) or min(widths) < 1:
        raise ValueError(f"--widths={','.join(_WIDTHS.value)}: expected widths such as 32,64,128")
    return widths


def _table(widths: Sequence[int], changes: Sequence[dict[str, float]]) -> str:
    head = ("place", *(f"width {width}" for width in widths), "exponent")
    slopes = exponents(widths, changes)
    lines = [
        (place, *(f"{change[place]:.4f}" for change in changes), f"{slope:+.2f}")
        for place, slope in slopes.items()
    ]
    return timing.table(head, lines, text_columns=1)


if __name__ == "__main__":
    run(main, required=("config",))
