r"""Any checkpoint, trained on: in low precision, on other text.

Command: python -m launch.train --config=configs/finetune.py --config.init=runs/tiny \
    --config.policy=w2 --workdir=runs/w2

Cost: for a checkpoint of configs/tiny.py about 15 seconds of training on 2 cores.
Expected: of configs/tiny.py (1.815 nats per byte; Python 3.11 standard library), rounded to w2 4.75
and w3 2.26, the models lose 2.11 and 1.85 after as many tokens again; w2 from scratch loses 2.13.

What is empty here is the checkpoint's own: shape, size rule and tokenizer always, text and length
if they are not given. A model that `launch.pretrained` converted knows nothing of its training, so
data.source, data.sequence_length and learning_rate are to be given.
"""

import ml_collections

from configs import experiment


def get_config() -> ml_collections.ConfigDict:
    """The experiment."""
    config = experiment.get_config()
    del config["scaling"]
    config.learning_rate = 0.0  # 0 is a tenth of the peak that the checkpoint was trained with

    config.model = ml_collections.ConfigDict()  # how it runs; what it is, the checkpoint says
    config.model.dtype = ""
    config.model.unroll = 0
    config.model.remat = ""

    config.data.source = ""
    config.data.tokenizer = ""
    config.data.sequence_length = 0  # tokens
    config.data.validation_fraction = 0.0
    return config
