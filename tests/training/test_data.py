"""Prepared text and its batches, against documents joined by hand."""

import collections
import hashlib
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from qat.training import data, packed_text, sources, tokenizer

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota"]
LENGTH = 16
OPTIONS = {"sequence_length": LENGTH, "validation_fraction": 0.2}


def make_texts(seed=0, count=80):
    random = np.random.default_rng(seed)
    sizes = random.integers(5, 40, count)
    return [f"{i}: " + " ".join(random.choice(WORDS, size)) for i, size in enumerate(sizes)]


def make_source(texts, name="made up/of: words"):
    return sources.Source(name, lambda: [text.encode() for text in texts])


def prepare(directory, texts=None, **options):
    source = make_source(make_texts() if texts is None else texts)
    return data.prepare(source, data_dir=directory, **(OPTIONS | options))


def of_side(texts, side):
    """Those whose hash is at least the fraction for "train", or below it for "validation"."""
    hashes = [int(hashlib.blake2b(t.encode(), digest_size=16).hexdigest(), 16) for t in texts]
    chosen = [(h / 16**32 < 0.2) == (side == "validation") for h in hashes]
    return [text for text, wanted in zip(texts, chosen, strict=True) if wanted]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def dataset(data_dir):
    return prepare(data_dir)


@pytest.fixture
def on_disk(data_dir, dataset, monkeypatch):
    """The same dataset, too large for memory."""
    monkeypatch.setattr(packed_text, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(packed_text, "_BLOCK_BYTES", 100)
    opened = prepare(data_dir / "on_disk")
    assert not isinstance(opened.train.records, np.ndarray)
    return opened


def test_records_are_the_documents_joined_by_separators(dataset):
    for name, side in (("train", dataset.train), ("validation", dataset.validation)):
        expected = of_side(make_texts(), name)
        joined = b"".join(text.encode() + b"\0" for text in expected)
        packed = side.records.tobytes()
        assert side.records.dtype == np.uint8
        assert side.records.shape == (len(joined) // (LENGTH + 1), LENGTH + 1)
        assert packed == joined[: len(packed)]
        assert side.dropped_tokens == len(joined) - len(packed) <= LENGTH
        assert side.documents == len(expected)
        assert side.tokens == len(side.records) * LENGTH
    assert dataset.train.documents + dataset.validation.documents == 80


def test_load_needs_no_source(dataset, tmp_path):
    loaded = data.load(str(dataset.directory))
    np.testing.assert_array_equal(loaded.train.records, dataset.train.records)
    np.testing.assert_array_equal(loaded.validation.records, dataset.validation.records)
    assert loaded.train.documents == dataset.train.documents
    assert loaded.fingerprint == dataset.fingerprint
    assert loaded.source == "made up/of: words"
    assert loaded.tokenizer == tokenizer.Bytes()
    assert loaded.vocabulary_size == 256
    assert (loaded.sequence_length, loaded.validation_fraction) == (LENGTH, 0.2)
    with pytest.raises(FileNotFoundError, match="is not a prepared dataset"):
        data.load(tmp_path)


def test_byte_pairs_are_learned_from_the_training_side_and_kept(tmp_path):
    texts = make_texts(count=200)
    dataset = prepare(tmp_path, texts, tokenizer="bpe:300")
    expected = tokenizer.parse_tokenizer("bpe:300").fit(lambda: of_side(texts, "train"))
    loaded = data.load(dataset.directory)
    assert loaded.tokenizer == dataset.tokenizer == expected
    assert loaded.vocabulary_size == 300
    assert loaded.train.records.dtype == np.uint16
    for name, side in (("train", loaded.train), ("validation", loaded.validation)):
        joined = "".join(text + "\0" for text in of_side(texts, name))
        decoded = loaded.tokenizer.decode(side.records.ravel())
        assert joined.startswith(decoded)
        assert len(joined) - len(decoded) <= 20 * side.dropped_tokens
    assert loaded.train.tokens < 0.5 * prepare(tmp_path, texts).train.tokens


def test_another_text_is_packed_with_the_tokenizer_of_the_first(tmp_path):
    first = prepare(tmp_path, make_texts(seed=3), tokenizer="bpe:300").tokenizer
    texts = make_texts(seed=4)
    dataset = prepare(tmp_path, texts, tokenizer=first)
    assert dataset.tokenizer == first
    expected = np.concatenate(
        [[*first.encode(t), first.separator] for t in of_side(texts, "train")]
    )
    found = np.asarray(dataset.train.records).reshape(-1)
    assert set(found) <= set(expected)
    assert first.decode(dataset.train.records[0]) in first.decode(expected)


def test_a_sample_is_enough_for_a_large_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SAMPLE_CHARACTERS", 5000)
    texts = make_texts(count=200)
    sampled = prepare(tmp_path / "a", texts, tokenizer="bpe:280").tokenizer
    monkeypatch.setattr(data, "SAMPLE_CHARACTERS", 10**9)
    assert sampled != prepare(tmp_path / "b", texts, tokenizer="bpe:280").tokenizer


def test_fingerprints_see_contents_token_ids_and_split_and_nothing_else(tmp_path):
    texts = make_texts()
    file = tmp_path / "tokenizer.json"
    reference = prepare(tmp_path / "0", texts)
    assert len(reference.fingerprint) == 16
    assert int(reference.fingerprint, 16) < 2**64
    changed = [
        prepare(tmp_path, [*texts, "one more"]),
        prepare(tmp_path, [*texts[:-1], texts[-1] + " "]),
        prepare(tmp_path, texts[::-1]),
        prepare(tmp_path, texts, validation_fraction=0.201),
        prepare(tmp_path, texts, tokenizer="bpe:280"),
        prepare(tmp_path, texts, tokenizer="bpe:281"),
    ]
    assert len({reference.fingerprint, *(each.fingerprint for each in changed)}) == 7
    assert len({each.directory for each in changed}) == 6
    assert prepare(tmp_path, texts, sequence_length=9).fingerprint == reference.fingerprint
    file.write_text(huggingface_json(279, of_side(texts, "train")))
    same_ids = prepare(tmp_path, texts, tokenizer=str(file))
    assert same_ids.fingerprint == changed[4].fingerprint


def huggingface_json(size, texts):
    """A tokenizer.json learned by the other library's own means."""
    import tokenizers

    learned = tokenizers.Tokenizer(tokenizers.models.BPE())
    learned.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False
    )
    learned.train_from_iterator(texts, trainer)
    return learned.to_str()


def test_counts_of_what_was_left_out_are_kept(tmp_path):
    texts = [text.encode() for text in make_texts()]
    source = sources.Source("mixed", lambda: [*texts, b"", b"", b"\xff"])
    dataset = data.prepare(source, data_dir=tmp_path, **OPTIONS)
    assert (dataset.unreadable_documents, dataset.empty_documents) == (1, 2)


def test_fresh_builds_are_equal(dataset, tmp_path):
    other = prepare(tmp_path)
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


def test_a_source_that_changes_while_it_is_read_is_an_error(tmp_path):
    reads = iter([make_texts(), [*make_texts(), "late"]])
    source = sources.Source("restless", lambda: [text.encode() for text in next(reads)])
    with pytest.raises(ValueError, match="'restless' changed while it was read"):
        data.prepare(source, data_dir=tmp_path, **OPTIONS)
    assert not list(tmp_path.iterdir())


def test_long_work_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_SECONDS_BETWEEN_REPORTS", 0.0)
    lines = []
    prepare(tmp_path, tokenizer="bpe:270", on_progress=lines.append)
    assert {line.split(": ")[2].split(" ")[0] for line in lines} == {"read", "sampled", "packed"}


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


def test_batches_from_disk_are_those_from_memory(dataset, on_disk):
    for make in (data.train_batches, data.validation_batches):
        seed = {"seed": 3} if make is data.train_batches else {}
        memory, disk = make(dataset, 4, **seed), make(on_disk, 4, **seed)
        for step in (0, 2, 1):
            np.testing.assert_array_equal(disk.batch_at(step), memory.batch_at(step))
            rows = slice(1, 3)
            np.testing.assert_array_equal(disk.batch_at(step, rows), memory.batch_at(step, rows))
    assert on_disk.train.tokens == dataset.train.tokens


def test_iteration_and_random_access_agree(dataset):
    batches = data.train_batches(dataset, 4, seed=5)
    steps = len(dataset.train.records) // 4 + 10  # into the second epoch
    iterated = [tokens for tokens, _ in zip(batches, range(steps), strict=False)]
    fresh = data.train_batches(dataset, 4, seed=5)
    for step in np.random.default_rng(0).permutation(steps).tolist():
        np.testing.assert_array_equal(fresh.batch_at(step), iterated[step])


@pytest.mark.parametrize("make", [data.train_batches, data.validation_batches])
@pytest.mark.parametrize("rows", [slice(0, 4), slice(4, 8), slice(1, 8, 2), slice(-1, None)])
def test_rows_are_those_of_the_whole_batch(dataset, make, rows):
    batches = make(dataset, 8, **({"seed": 7} if make is data.train_batches else {}))
    for step in (0, 1, 2):
        np.testing.assert_array_equal(batches.batch_at(step, rows), batches.batch_at(step)[rows])
    assert batches.batch_at(0, slice(0, 0)).shape == (0, LENGTH + 1)


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


def test_training_is_practically_endless(dataset):
    batches = data.train_batches(dataset, 8, seed=0)
    assert len(batches) > 10**17
    assert batches.batch_at(10**12).shape == (8, LENGTH + 1)


def test_validation_is_a_fixed_sample(dataset):
    size = 5
    records = dataset.validation.records
    steps = len(records) // size
    assert steps * size < len(records)
    batches = data.validation_batches(dataset, size)
    assert len(batches) == steps
    found = [row.astype(np.uint8).tobytes() for batch in batches for row in batch]
    available = collections.Counter(row.tobytes() for row in records)
    assert not collections.Counter(found) - available
    order = [[row.tobytes() for row in records].index(row) for row in found]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.5  # 0.1 is one deviation
    few = data.validation_batches(dataset, size, limit=2)
    np.testing.assert_array_equal(
        np.concatenate(list(few)), np.concatenate([batches.batch_at(0), batches.batch_at(1)])
    )
    assert len(data.validation_batches(dataset, size, limit=10**6)) == steps
    for step in (-1, steps):
        with pytest.raises(IndexError, match=f"step {step} is not in"):
            batches.batch_at(step)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size 0 is not at least 1"),
        ({"batch_size": 10**6}, "batch_size 1000000 exceeds the"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_bad_batch_arguments(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        data.train_batches(dataset, **({"batch_size": 4, "seed": 0} | options))


def test_bad_validation_arguments(dataset):
    with pytest.raises(ValueError, match="limit 0 is not at least 1 batch"):
        data.validation_batches(dataset, 4, limit=0)
    with pytest.raises(ValueError, match="batch_size 1000 exceeds the"):
        data.validation_batches(dataset, 1000)


def test_text_that_nothing_is_trained_on_is_whole(tmp_path):
    dataset = prepare(tmp_path, ["one text of which all is on one side"], validation_fraction=None)
    assert len(dataset.train.records) == 0
    assert len(dataset.validation.records) == 37 // (LENGTH + 1)
    with pytest.raises(ValueError, match="exceeds the 0 windows"):
        data.train_batches(dataset, 1, 0)


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
    with pytest.raises(ValueError, match="unknown tokenizer 'words'"):
        prepare(tmp_path, tokenizer="words")
    with pytest.raises(ValueError, match="the corpus has pairs for"):
        prepare(tmp_path, tokenizer="bpe:100000")
    with pytest.raises(ValueError, match="side has 0 tokens in 0 of the 1 documents"):
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


def test_import_does_not_import_tfds_or_tokenizers():
    code = """
import qat.training.data, sys
sys.exit(bool({'tensorflow_datasets', 'tokenizers', 'tiktoken'} & set(sys.modules)))
"""
    repository = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=repository, check=True)
