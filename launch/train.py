r"""Trains one model and writes its result row.

    python -m launch.train --config=configs/tiny.py --config.policy=w4a8 --workdir=runs/a

Any key of the config can be set on the command line. `--config.init=DIR` begins with the parameters
of a finished run or of what `launch.pretrained` converted, as when a full-precision model is
fine-tuned to ternary weights by `--config.policy=bitnet`; `--config.teacher=DIR` learns another's
soft labels. configs/finetune.py takes shape and tokenizer from there too:

    python -m launch.train --config=configs/finetune.py --config.init=runs/smollm2 \
        --config.policy=w4 --config.data.source=folder:PATH --config.data.sequence_length=256 \
        --config.learning_rate=2e-5 --workdir=runs/w4

A workdir belongs to one configuration; run the same command again to go on where it stopped,
however it stopped. It holds `rows.jsonl` with the results, `curve.csv` with loss, gradient norm and
learning rate of every step, and `checkpoints`; the branches of a warm-up–stable–decay run have a
folder each in `branches`.

Exit codes: 0 done; 2 bad input; 3 done, and the run diverged; 75 preempted by SIGTERM, run the
same command again; 130 stopped by Ctrl-C.
"""

from absl import flags
from ml_collections import config_flags

from launch import distributed, options
from launch.main import read_config, run

config_flags.DEFINE_config_file(
    "config", None, "Experiment to run (required); its keys are explained in configs/experiment.py."
)
flags.adopt_module_key_flags(options)


def main(argv: list[str]) -> int:
    """Trains, evaluates, writes the rows, prints the loss; returns the exit code."""
    del argv
    config = read_config()
    distributed.start()
    return options.train(config)


if __name__ == "__main__":
    run(main, required=("config", "workdir"))
