"""The keys every experiment has, with their defaults and units; other configs change some.

Optimizer and schedule are those of Kumar et al. (arXiv 2411.04330): AdamW with weight decay 0.1,
cosine after 10% of warm-up. Sizes, rates, clipping and the final rate are our own.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """An experiment of no particular size."""
    config = ml_collections.ConfigDict()
    config.policy = "none"  # see qat.Policy.parse
    config.init = ""  # folder of a model to begin with, see launch.checkpoints; "" is a random one
    config.teacher = ""  # of one whose soft labels to learn; "" is the text's own tokens
    config.tokens = 1_000_000  # training tokens; rounded down to whole batches
    config.batch_size = 32  # sequences
    config.accumulation = 1  # parts of a batch whose gradients are averaged one after another
    config.learning_rate = 3e-3  # peak, of a model of the base size
    config.weight_decay = 0.1
    config.not_decayed = ("scale", "bias", r"\w+_value")  # see qat.training.optimizer
    config.clip_norm = 1.0  # 0 does not clip
    config.seed = 0  # of initialisation, data order and noise

    config.schedule = ml_collections.ConfigDict()  # see qat.training.schedule
    config.schedule.name = "cosine"  # or "wsd": warm-up, stable, decay
    config.schedule.warmup_fraction = 0.1  # of the run; with branches, of the shortest
    config.schedule.final_fraction = 0.1  # of the peak, at the end
    config.schedule.cooldown = "sqrt"  # wsd: linear, sqrt or cosine
    config.schedule.cooldown_fraction = 0.2  # wsd: of the run
    config.schedule.branches = ()  # wsd: smaller numbers of tokens that branch off the same run

    config.scaling = ml_collections.ConfigDict()  # see qat.training.scaling
    config.scaling.rule = "fixed"  # or "depth-mup", "mup"
    config.scaling.base_width = 0  # of the model whose learning rate was tuned; 0 is this one's
    config.scaling.base_layers = 0
    config.scaling.base_heads = 0

    config.model = ml_collections.ConfigDict()  # see models.transformer.TransformerConfig
    config.model.vocabulary = 0  # 0 is the tokenizer's
    config.model.width = 32
    config.model.layers = 2
    config.model.heads = 2
    config.model.kv_heads = 1
    config.model.mlp_width = 0
    config.model.rope_base = 10_000.0
    config.model.dtype = "float32"
    config.model.unroll = 8  # at most
    config.model.remat = "none"
    config.model.experts = 0  # see models.moe; 0 is a dense model, for which the next keys are none
    config.model.experts_per_token = 1
    config.model.capacity_factor = 1.25
    config.model.balance = 0.01

    config.data = ml_collections.ConfigDict()  # see qat.training.data.prepare
    config.data.source = "stdlib"  # folder:PATH, jsonl:PATH or tfds:NAME, see sources.parse_source
    config.data.tokenizer = "bytes"  # bpe:8192 learns one; or the path of a tokenizer.json
    config.data.sequence_length = 64  # tokens
    config.data.validation_fraction = 0.05

    config.evaluation_batches = 64  # at most

    config.mesh = ml_collections.ConfigDict()  # devices; data = -1 takes what is left
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1
    return config
