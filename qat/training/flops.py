"""Analytic FLOPs of a decoder, one multiply-add counted as two.

Every weight of a matrix costs 2 FLOPs per token forward, attention costs 4·T·D per layer and
token (scores and mixing over all T positions, masked ones included, since that is what runs),
and the backward pass costs twice the forward. XLA's own count cannot be used: it counts the body
of a scan once. Quantization, norms and softmax are left out, as is usual.
"""


def forward_flops_per_token(
    matrix_params: int, layers: int, width: int, sequence_length: int
) -> int:
    """FLOPs of one token's forward pass.

    Args:
        matrix_params: parameters that take part in a matrix product, the head included.
        layers: attention layers.
        width: heads times head channels.
        sequence_length: tokens attended over.
    """
    return 2 * matrix_params + 4 * layers * width * sequence_length


def train_flops(
    tokens: int, matrix_params: int, layers: int, width: int, sequence_length: int
) -> int:
    """FLOPs of training on this many tokens: three forward passes' worth each."""
    return 3 * tokens * forward_flops_per_token(matrix_params, layers, width, sequence_length)
