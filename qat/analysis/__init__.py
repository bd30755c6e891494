"""Questions asked of a trained model: how far from the original, where in the context, how sure.

`agreement` compares next-token distributions token by token, on the device and a part of the
logits at a time. What it returns is small, one number a token, so `paired` and `context` do the
statistics on the host in float64. `size` counts the bits a model takes.

Modules of their own: `sharpness` asks the Hessian what changes of the weights cost; `independence`,
`powers` and `replicates` ask tables of many models.
"""

from qat.analysis.agreement import Agreement, agreement, agreement_of_states
from qat.analysis.context import by_position, edges
from qat.analysis.paired import mean_and_standard_error
from qat.analysis.size import stored_bits, total_bits

__all__ = [
    "Agreement",
    "agreement",
    "agreement_of_states",
    "by_position",
    "edges",
    "mean_and_standard_error",
    "stored_bits",
    "total_bits",
]
