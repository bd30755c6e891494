"""The set-up of Kumar et al., *Scaling Laws for Precision* (arXiv 2411.04330), one size a config.

What the paper says: decoders with SwiGLU, RoPE and an RMSNorm before every projection, of 30, 60,
110 and 220 million non-embedding parameters and one of 1.7 billion; 1.5, 3, 6, 13 and 26 billion
tokens in batches of 256 sequences of 1024; Adam (0.9, 0.95) with eps 1e-15 and weight decay 0.1;
10% of warm-up and a cosine, 6e-4 at its peak for the smallest model and by depth-µP for the others.

What the paper leaves open, and is our choice: the shapes (heads of 64 channels, as many key-value
heads as heads, a width of about 55 times the depth, the gated layer filling up to N), a cosine
that ends at a tenth of its peak, clipping at norm 1, bfloat16 arithmetic on float32 parameters.
The vocabulary has as many ids as OLMo's, 50,280, padded to 50,304 = 3 · 131 · 128, but is learned
from the text. The paper trains on the Common Crawl part of Dolma; the source here is the English
part of C4, so losses are near the paper's but not the same.

Of the five budgets a config has the largest; take another by --config.tokens=1_500_000_000 and so
on. Precision is --config.policy: the paper trains with w3 … w12, a3 … a12, kv3 … kv12, each alone
and several together.
"""

import ml_collections

from configs import experiment

TOKENS = (1_500_000_000, 3_000_000_000, 6_000_000_000, 13_000_000_000, 26_000_000_000)
VOCABULARY = 50_304
BASE_LAYERS = 10  # of the smallest model, whose learning rate is given
HEAD_CHANNELS = 64


def make_config(width: int, layers: int, mlp_width: int) -> ml_collections.ConfigDict:
    """The experiment of one shape.

    Args:
        width: of the residual stream, a multiple of 64.
        layers: blocks.
        mlp_width: of the gated layer.
    """
    config = experiment.get_config()
    config.tokens = TOKENS[-1]
    config.batch_size = 256
    config.learning_rate = 6e-4

    config.scaling.rule = "depth-mup"
    config.scaling.base_layers = BASE_LAYERS

    config.model.vocabulary = VOCABULARY
    config.model.width = width
    config.model.layers = layers
    config.model.heads = config.model.kv_heads = width // HEAD_CHANNELS
    config.model.mlp_width = mlp_width
    config.model.dtype = "bfloat16"
    config.model.unroll = 1
    config.model.remat = "full"

    config.data.source = "tfds:c4/en"
    config.data.tokenizer = "bpe:50280"
    config.data.sequence_length = 1024
    config.data.validation_fraction = 0.001
    return config
