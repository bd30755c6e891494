"""LLM-QAT (arXiv 2305.17888): a checkpoint's low-precision student, taught without data.

Command: python -m launch.distill --checkpoint=runs/full --config.policy=w4a8kv4 --workdir=runs/w4
Cost: for a checkpoint of configs/tiny.py about 30 seconds of writing and 30 of training on 2 cores.
Expected: of configs/tiny.py trained on 12 million tokens (1.354 nats per byte; Python 3.11 standard
library), rounded to w2 5.71 and w3 2.10, the students lose 2.10 and 1.60 at the rates given here;
w2 learns more at higher rates (2.00 at a third of the checkpoint's peak), w3 at lower ones (1.58).

What is empty here is the checkpoint's own, as in configs/finetune.py. Its text is what the student
is evaluated on; what it learns from the teacher writes. The paper trains LLaMA on 100,000 sequences
of 2048 tokens, once, with AdamW without decay at 2e-5, a fifteenth of LLaMA's own peak of 3e-4.
"""

import ml_collections

from configs import finetune


def get_config() -> ml_collections.ConfigDict:
    """The experiment."""
    config = finetune.get_config()
    for key in ("init", "teacher"):
        del config[key]
    config.weight_decay = 0.0

    config.writing = ml_collections.ConfigDict()  # see launch.own_text
    config.writing.sequences = 8192  # those of validation, a share as of the data, among them
    config.writing.batch_size = 256  # sequences written at once
    config.writing.greedy = (3, 5)  # tokens after the first, least and most, that are most likely
    config.writing.temperature = 1.0
    config.writing.top_k = 0  # 0 is all
    config.writing.seed = 0
    return config
