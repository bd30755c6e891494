"""Text to evaluate on, and text to calibrate with, which are never the same documents.

Every text is packed once, as for training (`qat.training.data`), with the model's own tokenizer.
Windows come always in the same shuffled order. Of the text that a model was trained on, the split
is that of its training: it is evaluated on validation windows and calibrated with training windows.
Any other text is used whole, unless the same files are for both, of which each then has half of the
documents.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

from launch.checkpoints import Checkpoint
from launch.lab import Lab
from qat.training.data import TextDataset, prepare, train_batches, validation_batches
from qat.training.sources import parse_source

_TOKENS_OF_A_BATCH = 4096
_HALF = 0.5
_FEWEST = 2  # sequences, for a standard error
_UNKNOWN_LENGTH, _UNKNOWN_SEQUENCES = 512, 64  # where no run says how it was evaluated

# N: sequences; S = T + 1: tokens of a window; B: sequences of a batch.


@dataclasses.dataclass(frozen=True, eq=False)
class TextSet:
    """What models are evaluated on.

    Attributes:
        name: as rows have it under `eval_set`.
        fingerprint: of the corpus.
        tokens_NS: windows.
    """

    name: str
    fingerprint: str
    tokens_NS: Int32[np.ndarray, "N S"]

    @property
    def evaluated(self) -> int:
        """Sequences in all batches."""
        return sum(map(len, self.batches()))

    def batches(self) -> list[Int32[np.ndarray, "B S"]]:
        """Of one shape; the last is filled up with sequences from the beginning."""
        count, window = self.tokens_NS.shape
        size = min(count, max(1, _TOKENS_OF_A_BATCH // (window - 1)))
        steps = -(-count // size)
        rows = np.resize(np.arange(count), (steps, size))
        return [self.tokens_NS[each] for each in rows]


@dataclasses.dataclass(frozen=True, eq=False)
class Library:
    """Texts prepared for a model.

    Attributes:
        checkpoint: the model.
        data_dir: where prepared text is kept.
        say: takes lines about slow work.
        shared: share of the documents to evaluate on, of texts that also calibrate; see `sharing`.
    """

    checkpoint: Checkpoint
    data_dir: Path
    say: Callable[[str], None]
    shared: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def own(self) -> str | None:
        """The source it was trained on, where that is known."""
        source: str | None = self._data.get("source")
        return source

    @property
    def length(self) -> int:
        """Tokens of a sequence it was evaluated on in training."""
        longest = self.checkpoint.sequence_length or _UNKNOWN_LENGTH
        length: int = self._data.get("sequence_length", min(longest, _UNKNOWN_LENGTH))
        return length

    @property
    def sequences(self) -> int:
        """How many it was evaluated on in training."""
        if self.checkpoint.experiment is None:
            return _UNKNOWN_SEQUENCES
        config = self.checkpoint.experiment.config
        sequences: int = config["evaluation_batches"] * config["batch_size"]
        return sequences

    def sharing(self, sources: Sequence[str], calibration: str) -> "Library":
        """The library in which no text to evaluate on has documents that are to calibrate with.

        A document's hash says for which it is, so that texts may overlap in any way.

        Raises:
            ValueError, OSError: see `qat.training.sources.parse_source`; or files cannot be listed.
        """
        files = self._files(calibration)
        common = [s for s in sources if s == calibration or not files.isdisjoint(self._files(s))]
        fraction = self._split(calibration) or _HALF
        return dataclasses.replace(
            self, shared=dict.fromkeys([*common, calibration] if common else [], fraction)
        )

    def name(self, source: str, side: str) -> str:
        """What of a text is used, as rows have it."""
        return source if self._split(source) is None else f"{source}/{side}"

    def dataset(self, source: str, length: int) -> TextDataset:
        """A text in windows of a length; all are validation windows where it is not split.

        Raises:
            ValueError, OSError: see `qat.training.data.prepare`; or it is what the model was
                trained on, and has changed since.
        """
        if source == self.own and length == self.length:
            return self._own_dataset()
        return prepare(
            source,
            length,
            self.data_dir,
            tokenizer=self.checkpoint.tokenizer(self.data_dir),
            validation_fraction=self._split(source),
            on_progress=self.say,
        )

    def text_sets(self, sources: Sequence[str], sequences: int, length: int) -> list[TextSet]:
        """Texts to evaluate on; says where there are fewer sequences than asked for.

        Args:
            sources: see `qat.training.sources.parse_source`.
            sequences: of each, at most.
            length: T.

        Raises:
            ValueError, OSError: see `dataset`; or a text has too few sequences.
        """
        return [self._text_set(source, sequences, length) for source in dict.fromkeys(sources)]

    def calibration(
        self, source: str, sequences: int, length: int
    ) -> list[Int32[np.ndarray, "B T"]]:
        """Inputs of a model, in batches of one shape.

        Args:
            source: see `qat.training.sources.parse_source`.
            sequences: of all batches together.
            length: T.

        Raises:
            ValueError, OSError: see `dataset`; or there are too few sequences.
        """
        needed = (
            f"calibration needs {sequences:,} sequences of {length:,} tokens, "
            f"{sequences * length:,} tokens"
        )
        try:
            dataset = self.dataset(source, length)
        except ValueError as error:
            raise ValueError(f"{needed}; text {source!r}: {error}") from None
        whole = self._split(source) is None
        there = len((dataset.validation if whole else dataset.train).records)
        if there < sequences:
            beside = "" if whole else " beside those to evaluate on"
            raise ValueError(
                f"{needed}; text {source!r} has {there:,} such sequences{beside}, "
                f"{there * length:,} tokens: expected more text or smaller "
                "--calibration_sequences or --calibration_length"
            )
        if whole:
            tokens_NS = validation_batches(dataset, sequences).batch_at(0)
        else:
            tokens_NS = train_batches(dataset, sequences, seed=0).batch_at(0)
        most = max(1, _TOKENS_OF_A_BATCH // length)
        size = next(each for each in range(most, 0, -1) if sequences % each == 0)
        return list(tokens_NS[:, :-1].reshape(-1, size, length))

    @property
    def _data(self) -> dict[str, Any]:
        """What the run's config says of its text; nothing of a converted model."""
        experiment = self.checkpoint.experiment
        return {} if experiment is None else experiment.config["data"]

    def _split(self, source: str) -> float | None:
        """Share of a text's documents to evaluate on; None of a text that is used whole."""
        fraction: float | None = self.shared.get(source)
        return self._data["validation_fraction"] if source == self.own else fraction

    def _files(self, source: str) -> set[Path]:
        return {path.resolve() for path in parse_source(source, self.data_dir).files()}

    def _own_dataset(self) -> TextDataset:
        """What the model was trained on, as it was then."""
        experiment = self.checkpoint.experiment
        assert experiment is not None
        dataset = Lab(self.data_dir, jax.devices()[:1]).dataset(experiment)
        if dataset.fingerprint != self.checkpoint.data_fingerprint:
            raise ValueError(
                f"text {self.own} has changed since the model was trained on it: fingerprint "
                f"{self.checkpoint.data_fingerprint} then, {dataset.fingerprint} now; "
                "expected another --text"
            )
        return dataset

    def _text_set(self, source: str, sequences: int, length: int) -> TextSet:
        try:
            dataset = self.dataset(source, length)
        except ValueError as error:
            if source not in self.shared:
                raise
            raise ValueError(
                f"text {source!r} is also calibrated with (expected other --calibration_text, or "
                f"enough documents for both): {error}"
            ) from None
        there = len(dataset.validation.records)
        if there < _FEWEST or sequences < _FEWEST:
            raise ValueError(
                f"text {source!r}: {min(there, sequences)} sequences of {length} tokens to be "
                f"evaluated on, expected at least {_FEWEST}, for a standard error"
            )
        if there < sequences:
            self.say(f"text {source}: evaluated on all {there} sequences, {sequences} asked for")
        tokens_NS = validation_batches(dataset, min(there, sequences), 1).batch_at(0)
        name = self.name(source, "validation") + ("" if length == self.length else f"@{length}")
        return TextSet(name, dataset.fingerprint, tokens_NS)
