r"""Teaches a checkpoint's low-precision student by text that the checkpoint writes (LLM-QAT).

    python -m launch.distill --checkpoint=runs/full --config.policy=w4a8kv4 --workdir=runs/w4

No text is needed to learn from: the checkpoint, in full precision, writes it, once for all
policies, and what the student learns are the checkpoint's soft labels. The checkpoint is the
workdir of a finished run of `launch.train` with policy `none`, or a model that `launch.pretrained`
converted; the student has its shape and tokenizer, begins with its parameters and is evaluated on
its validation text. A converted model has none, and knows neither length nor rate:

    python -m launch.distill --checkpoint=runs/smollm2 --config.policy=w4a8kv4 \
        --config.data.source=folder:PATH --config.data.sequence_length=256 \
        --config.learning_rate=2e-5 --workdir=runs/w4

Keys of the config are explained in configs/distill.py.

The run is one like those of `launch.train`: the same command goes on after a stop, also amid the
writing, `rows.jsonl` has the result with `init` and `teacher` in it, `curve.csv` the cross entropy
with the teacher.

Exit codes: 0 done; 2 bad input; 3 done, and the run diverged; 75 preempted by SIGTERM, run the
same command again; 130 stopped by Ctrl-C.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from launch import distributed, options
from launch.main import read_config, run

_DEFAULT = Path(__file__).parents[1] / "configs" / "distill.py"

config_flags.DEFINE_config_file(
    "config", None, "How to distill; configs/distill.py, which explains its keys, if not given."
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Workdir of launch.train or launch.pretrained, to start from and to learn from (required).",
)
flags.adopt_module_key_flags(options)


def main(argv: list[str]) -> int:
    """Writes text, trains, evaluates, writes the row, prints the loss; returns the exit code."""
    del argv
    config = read_config()
    distributed.start()
    from launch import origin

    return options.train(origin.student_of(str(_CHECKPOINT.value), config))


if __name__ == "__main__":
    run(main, required=("checkpoint", "workdir"), config=_DEFAULT)
