"""Prepared text and its batches, against documents joined by hand."""

import collections
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from qat.training import corpus, data

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota"]
LENGTH = 16
OPTIONS = {"sequence_length": LENGTH, "validation_fraction": 0.2}


def make_texts(seed=0, count=80):
    random = np.random.default_rng(seed)
    sizes = random.integers(5, 40, count)
    return [f"{i}: " + " ".join(random.choice(WORDS, size)) for i, size in enumerate(sizes)]


def make_source(texts, name="made up/of: words"):
    return corpus.Source(name, lambda: [text.encode() for text in texts])


def prepare(directory, texts=None, **options):
    source = make_source(make_texts() if texts is None else texts)
    return data.prepare(source, data_dir=directory, **(OPTIONS | options))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def dataset(data_dir):
    return prepare(data_dir)


def test_records_are_the_documents_joined_by_separators(dataset):
    documents = corpus.read_corpus(make_source(make_texts()))
    for side, expected in zip(
        (dataset.train, dataset.validation), corpus.split(documents, 0.2), strict=True
    ):
        joined = b"".join(document.text.encode() + b"\0" for document in expected)
        packed = side.records.tobytes()
        assert side.records.dtype == np.uint8
        assert side.records.shape == (len(joined) // (LENGTH + 1), LENGTH + 1)
        assert packed == joined[: len(packed)]
        assert side.dropped_tokens == len(joined) - len(packed) <= LENGTH
        assert side.documents == len(expected)
        assert side.tokens == len(side.records) * LENGTH
        assert set(packed.split(b"\0")[:-1]) <= {text.encode() for text in make_texts()}
    assert dataset.train.documents + dataset.validation.documents == 80


def test_load_needs_no_source(dataset, tmp_path):
    loaded = data.load(str(dataset.directory))
    np.testing.assert_array_equal(loaded.train.records, dataset.train.records)
    np.testing.assert_array_equal(loaded.validation.records, dataset.validation.records)
    assert loaded.train.documents == dataset.train.documents
    expected = corpus.read_corpus(make_source(make_texts()))
    assert loaded.fingerprint == corpus.fingerprint(expected, corpus.BYTES, 0.2)
    assert loaded.source == "made up/of: words"
    assert (loaded.tokenizer, loaded.vocabulary_size) == ("bytes", 256)
    assert (loaded.sequence_length, loaded.validation_fraction) == (LENGTH, 0.2)
    with pytest.raises(FileNotFoundError, match="is not a prepared dataset"):
        data.load(tmp_path)


def test_counts_of_what_was_left_out_are_kept(tmp_path):
    texts = [text.encode() for text in make_texts()]
    source = corpus.Source("mixed", lambda: [*texts, b"", b"", b"\xff"])
    dataset = data.prepare(source, data_dir=tmp_path, **OPTIONS)
    assert (dataset.unreadable_documents, dataset.empty_documents) == (1, 2)


def test_fresh_builds_are_equal(dataset, tmp_path):
    other = prepare(tmp_path, make_texts()[::-1])
    assert other.directory.relative_to(tmp_path) == dataset.directory.relative_to(
        dataset.directory.parents[2]
    )
    np.testing.assert_array_equal(other.train.records, dataset.train.records)
    np.testing.assert_array_equal(other.validation.records, dataset.validation.records)
    batches = [data.train_batches(each, 4, seed=3).batch_at(9) for each in (dataset, other)]
    np.testing.assert_array_equal(*batches)


def test_a_prepared_dataset_is_not_written_again(dataset, data_dir, monkeypatch):
    monkeypatch.setattr("qat.training.packed_text.write", None)
    again = prepare(data_dir)
    assert again.directory == dataset.directory
    np.testing.assert_array_equal(again.train.records, dataset.train.records)


def test_what_makes_another_dataset_has_another_directory(dataset, data_dir):
    others = [
        prepare(data_dir, [*make_texts(), "one more"]),
        prepare(data_dir, sequence_length=LENGTH + 1),
        prepare(data_dir, validation_fraction=0.3),
    ]
    assert len({dataset.directory, *(other.directory for other in others)}) == 4
    assert others[1].fingerprint == dataset.fingerprint
    assert others[1].train.records.shape[1] == LENGTH + 2


def test_epochs_and_tokens(dataset):
    assert dataset.epochs(3 * dataset.train.tokens) == 3
    assert dataset.epochs(dataset.train.tokens // 2) == pytest.approx(0.5, rel=0.01)


def test_batches_are_windows_as_int32(dataset):
    tokens = data.train_batches(dataset, 4, seed=0).batch_at(0)
    assert isinstance(tokens, np.ndarray)
    assert tokens.shape == (4, LENGTH + 1)
    assert tokens.dtype == np.int32
    windows = {row.tobytes() for row in dataset.train.records}
    assert all(row.astype(np.uint8).tobytes() in windows for row in tokens)


def test_iteration_resume_and_random_access_agree(dataset):
    batches = data.train_batches(dataset, 4, seed=5)
    steps = len(dataset.train.records) // 4 + 10  # into the second epoch
    iterated = [tokens for tokens, _ in zip(batches, range(steps), strict=False)]
    fresh = data.train_batches(dataset, 4, seed=5)
    for step in np.random.default_rng(0).permutation(steps).tolist():
        np.testing.assert_array_equal(fresh.batch_at(step), iterated[step])
    resumed = iter(data.train_batches(dataset, 4, seed=5, start_step=steps - 3))
    for step in range(steps - 3, steps):
        np.testing.assert_array_equal(next(resumed), iterated[step])


def test_every_epoch_holds_every_window_once_in_another_order(dataset):
    count = len(dataset.train.records)
    batches = data.train_batches(dataset, 1, seed=1)
    epochs = [
        [
            batches.batch_at(step)[0].astype(np.uint8).tobytes()
            for step in range(start, start + count)
        ]
        for start in (0, count)
    ]
    expected = collections.Counter(row.tobytes() for row in dataset.train.records)
    assert collections.Counter(epochs[0]) == collections.Counter(epochs[1]) == expected
    assert epochs[0] != epochs[1]
    assert epochs[0] != [row.tobytes() for row in dataset.train.records]


def test_seeds_and_steps_differ(dataset):
    seen = {
        data.train_batches(dataset, 8, seed=seed).batch_at(step).tobytes()
        for seed in (0, 1, 2, 2**31)
        for step in (0, 1, 100)
    }
    assert len(seen) == 12


@pytest.mark.parametrize("make", [data.train_batches, data.validation_batches])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(dataset, make, count):
    seed = {"seed": 7} if make is data.train_batches else {}
    whole = make(dataset, 8, **seed)
    parts = [
        make(dataset, 8, process_index=index, process_count=count, **seed) for index in range(count)
    ]
    if make is data.validation_batches:
        assert {len(part) for part in parts} == {len(whole)}
    for step in (0, 1, 2):
        rows = [part.batch_at(step) for part in parts]
        assert rows[0].shape == (8 // count, LENGTH + 1)
        interleaved = np.stack(rows, axis=1).reshape(8, LENGTH + 1)
        np.testing.assert_array_equal(interleaved, whole.batch_at(step))


def test_validation_is_in_order_and_bounded(dataset):
    size = 5
    records = dataset.validation.records
    steps = len(records) // size
    assert steps * size < len(records)
    batches = data.validation_batches(dataset, size)
    assert len(batches) == steps
    np.testing.assert_array_equal(np.concatenate(list(batches)), records[: steps * size])
    np.testing.assert_array_equal(
        np.concatenate(list(data.validation_batches(dataset, size, limit=2))), records[: 2 * size]
    )
    assert len(data.validation_batches(dataset, size, limit=10**6)) == steps
    for step in (-1, steps):
        with pytest.raises(IndexError, match=f"step {step} is not in"):
            batches.batch_at(step)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "process_count": 4}, "batch_size 6 is not a positive multiple of 4"),
        ({"batch_size": 0}, "batch_size 0 is not"),
        ({"batch_size": 10**6}, "batch_size 1000000 exceeds the"),
        ({"process_index": 2, "process_count": 2}, r"process_index 2 is not in \[0, 2\)"),
        ({"start_step": -1}, "start_step -1"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_bad_batch_arguments(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        data.train_batches(dataset, **({"batch_size": 4, "seed": 0} | options))


def test_bad_validation_arguments(dataset):
    with pytest.raises(ValueError, match="limit 0 is not at least 1 batch"):
        data.validation_batches(dataset, 4, limit=0)
    with pytest.raises(ValueError, match="batch_size 3 is not a positive multiple of 2"):
        data.validation_batches(dataset, 3, process_count=2)


def test_bad_corpora(tmp_path):
    with pytest.raises(ValueError, match="unknown source 'stdlb'"):
        data.prepare("stdlb", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        data.prepare(f"folder:{tmp_path / 'nowhere'}", data_dir=tmp_path)
    with pytest.raises(ValueError, match="lies in the corpus"):
        data.prepare(f"folder:{tmp_path}", data_dir=tmp_path / "data")
    with pytest.raises(ValueError, match="sequence_length 0"):
        prepare(tmp_path, sequence_length=0)
    with pytest.raises(ValueError, match=r"validation_fraction 1\.0 is not in"):
        prepare(tmp_path, validation_fraction=1.0)
    with pytest.raises(ValueError, match="side has 0 tokens in 0 documents"):
        prepare(tmp_path, ["one text of which only one side can have anything"])
    with pytest.raises(ValueError, match=r"the train side has .* one window of 1000001 tokens"):
        prepare(tmp_path, sequence_length=10**6)
    assert not list(tmp_path.iterdir())


def test_other_processes_wait_for_process_0(tmp_path):
    with pytest.raises(TimeoutError, match=r"was not prepared within 0\.1 s"):
        prepare(tmp_path, process_index=1, wait_seconds=0.1)
    assert not list(tmp_path.iterdir())
    waited = []
    waiting = threading.Thread(
        target=lambda: waited.append(prepare(tmp_path, process_index=1, wait_seconds=60.0))
    )
    waiting.start()
    prepared = prepare(tmp_path, process_index=0)
    waiting.join()
    np.testing.assert_array_equal(waited[0].train.records, prepared.train.records)


def test_import_does_not_import_tfds():
    code = "import qat.training.data, sys; sys.exit('tensorflow_datasets' in sys.modules)"
    repository = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=repository, check=True)
