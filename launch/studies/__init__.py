"""What `launch.study` asks of the rows of a study, one question a file."""

from collections.abc import Callable, Mapping

from launch.studies import (
    curvature,
    decay,
    experts,
    formats,
    noise,
    operands,
    optimum,
    positions,
    rates,
    reproduction,
    rotation,
    rounding,
    shapes,
    ternary,
)
from launch.studies.answer import Answer
from launch.studies.rows import Study

QUESTIONS: Mapping[str, Callable[[Study], Answer]] = {
    "rates": rates.answer,
    "noise": noise.answer,
    "shapes": shapes.answer,
    "optimum": optimum.answer,
    "rounding": rounding.answer,
    "rotation": rotation.answer,
    "decay": decay.answer,
    "curvature": curvature.answer,
    "operands": operands.answer,
    "formats": formats.answer,
    "ternary": ternary.answer,
    "positions": positions.answer,
    "experts": experts.answer,
    "reproduction": reproduction.answer,
}
