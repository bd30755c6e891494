"""Models that others trained: read from their files, kept in a folder of this project's own.

`read` takes a GGUF file or a folder of Hugging Face's safetensors; neither needs torch nor
transformers. What both formats say of a model becomes a `llama.Checkpoint` (settings, tensors by
name that are read one at a time, a tokenizer), and `llama` turns that into the parameters of
`models.transformer`. `write` keeps the result in a folder, which `load` opens fast and bit-exact.
"""

from models.pretrained.folder import (
    Description,
    Pretrained,
    check_free,
    describe,
    is_pretrained,
    load,
    read,
    write,
)

__all__ = [
    "Description",
    "Pretrained",
    "check_free",
    "describe",
    "is_pretrained",
    "load",
    "read",
    "write",
]
