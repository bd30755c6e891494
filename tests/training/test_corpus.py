"""Documents, their split and their fingerprint, against hashes and file lists made by hand."""

import hashlib
import itertools
import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from qat.training import corpus

TEXTS = [f"document {i}\n" + "words, words\n" * (i % 7) for i in range(400)]


def make_source(texts, name="made"):
    return corpus.Source(name, lambda: [text.encode() for text in texts])


def make_corpus(texts):
    return corpus.read_corpus(make_source(texts))


def texts_of(documents):
    return [document.text for document in documents]


def fingerprint(texts, tokenizer=corpus.BYTES, fraction=0.05):
    return corpus.fingerprint(make_corpus(texts), tokenizer, fraction)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("stdlb", "unknown source 'stdlb'.*nearest is 'stdlib'"),
        ("foldr:/tmp", "nearest is 'folder'"),
        ("tdfs:lm1b", "nearest is 'tfds'"),
        ("", "unknown source ''"),
        ("stdlib:3.11", "takes no argument"),
        ("folder", "names nothing to read; expected 'folder:"),
        ("tfds:", "names nothing to read; expected 'tfds:"),
    ],
)
def test_unknown_sources_name_the_nearest_spelling(spec, message):
    with pytest.raises(ValueError, match=message):
        corpus.parse_source(spec)


def test_folder_reads_text_of_any_suffix_and_counts_the_rest(tmp_path, caplog):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    contents = {
        "a.txt": b"one\r\n",
        "deep/b.md": "zwei \N{GREEK SMALL LETTER ALPHA}".encode(),
        "deep/er/README": b"three",
        "empty.py": b"",
        "latin.txt": "caf\N{LATIN SMALL LETTER E WITH ACUTE}".encode("latin-1"),
        "image.png": b"\x89PNG\r\n\x1a\n",
        "zeros.bin": b"text\0text",
        ".hidden.txt": b"hidden",
        ".git/config": b"hidden",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    read = corpus.read_corpus(corpus.parse_source(f"folder:{tmp_path}"))
    assert sorted(texts_of(read.documents)) == sorted(["one\r\n", "zwei α", "three"])
    assert (read.unreadable, read.empty) == (3, 1)
    assert "left out 3 files" in caplog.text


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    (tmp_path / "a.txt").write_text("text")
    closed.chmod(0)
    if os.access(closed, os.R_OK):
        pytest.skip("this user may list every folder")
    with pytest.raises(PermissionError):
        corpus.read_corpus(corpus.parse_source(f"folder:{tmp_path}"))


def test_missing_folder_and_empty_corpora(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        corpus.read_corpus(corpus.parse_source(f"folder:{tmp_path / 'nowhere'}"))
    with pytest.raises(ValueError, match="no text: 0 unreadable and 0 empty"):
        corpus.read_corpus(corpus.parse_source(f"folder:{tmp_path}"))
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "binary").write_bytes(b"\xff\xff")
    with pytest.raises(ValueError, match="no text: 1 unreadable and 1 empty"):
        corpus.read_corpus(corpus.parse_source(f"folder:{tmp_path}"))


def test_split_is_the_hash_of_the_content():
    train, validation = corpus.split(make_corpus(TEXTS), 0.05)

    def position(text):  # of the hash in [0, 1)
        return int(hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), 16) / 16**32

    assert set(texts_of(validation)) == {text for text in TEXTS if position(text) < 0.05}
    assert sorted(texts_of(train) + texts_of(validation)) == sorted(TEXTS)
    assert 5 <= len(validation) <= 40  # 20 expected; more than three standard deviations either way


def test_a_larger_fraction_only_moves_documents_to_validation():
    documents = make_corpus(TEXTS)
    sides = [set(texts_of(corpus.split(documents, f)[1])) for f in (0.01, 0.05, 0.3, 0.9)]
    assert all(small < large for small, large in itertools.pairwise(sides))


def test_copies_lie_on_one_side_and_apart():
    train, validation = corpus.split(make_corpus(TEXTS * 2), 0.3)
    assert not set(texts_of(train)) & set(texts_of(validation))
    assert sorted(texts_of(train) + texts_of(validation)) == sorted(TEXTS * 2)
    pairs = itertools.pairwise(train)
    assert sum(a.text == b.text for a, b in pairs) < 5  # one expected; 280 if sorted by content


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 5.0])
def test_fraction_must_leave_both_sides(fraction):
    with pytest.raises(ValueError, match=f"validation_fraction {fraction} is not in"):
        corpus.split(make_corpus(TEXTS), fraction)


def test_packing_order_is_shuffled_and_a_function_of_the_contents():
    ordered = texts_of(make_corpus(TEXTS).documents)
    assert ordered == texts_of(make_corpus(TEXTS[::-1]).documents)
    ranks = np.array([TEXTS.index(text) for text in ordered])
    assert abs(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1]) < 0.2  # 0.05 is one deviation


def test_fingerprint_sees_contents_tokenizer_and_split_and_nothing_else(tmp_path):
    reference = fingerprint(TEXTS)
    assert reference == fingerprint(TEXTS[::-1])
    assert int(reference, 16) < 2**64
    assert len(reference) == 16
    other_tokenizer = corpus.Tokenizer("other", 256, 0, corpus.BYTES.encode, corpus.BYTES.decode)
    changed = [
        fingerprint(TEXTS[:-1]),
        fingerprint([*TEXTS, TEXTS[0]]),
        fingerprint([*TEXTS[:-1], TEXTS[-1] + " "]),
        fingerprint(TEXTS, tokenizer=other_tokenizer),
        fingerprint(TEXTS, fraction=0.051),
    ]
    assert len({reference, *changed}) == 1 + len(changed)
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{(i * 7919) % 400}.txt").write_text(text)
    folder = corpus.read_corpus(corpus.parse_source(f"folder:{tmp_path}"))
    assert corpus.fingerprint(folder, corpus.BYTES, 0.05) == reference


def test_long_texts_are_cut_after_lines_without_loss(monkeypatch):
    monkeypatch.setattr(corpus, "SECTION_CHARACTERS", 10)
    text = "ab\ncdefgh\n" + "x" * 25 + "\nlast"
    sections = texts_of(make_corpus([text]).documents)
    assert set(sections) == {"ab\ncdefgh\n", "x" * 10, "x" * 5 + "\nlast"}
    assert len(sections) == 4
    monkeypatch.setattr(corpus, "SECTION_CHARACTERS", 20)
    assert texts_of(make_corpus(["y" * 20]).documents) == ["y" * 20]


def test_bytes_tokenizer():
    text = "naïve\0 α\n"
    ids = corpus.BYTES.encode(text)
    assert ids.dtype == np.uint8
    assert ids.tolist() == list(b"na\xc3\xafve \xce\xb1\n")
    assert corpus.BYTES.decode(ids) == "naïve α\n"
    assert corpus.BYTES.separator not in ids
    assert corpus.BYTES.decode(ids[:3]) == "na\ufffd"
    every = np.arange(corpus.BYTES.vocabulary_size)
    assert len(corpus.BYTES.decode(every.astype(np.int32))) >= 128


@pytest.fixture(scope="module")
def stdlib():
    return corpus.read_corpus(corpus.parse_source("stdlib"))


def test_stdlib_is_the_library_without_tests_and_packages(stdlib):
    root = Path(sysconfig.get_path("stdlib"))
    unwanted = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    contents = [
        path.read_bytes().decode()
        for path in root.rglob("*.py")
        if not unwanted & set(path.relative_to(root).parts)
    ]
    assert len(contents) > 500
    assert stdlib.unreadable == 0
    assert stdlib.empty == sum(not content for content in contents)
    assert sum(map(len, texts_of(stdlib.documents))) == sum(map(len, contents))
    assert (root / "json" / "decoder.py").read_text() in texts_of(stdlib.documents)


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A text dataset of two configurations, prepared as anyone would prepare one."""
    import tensorflow_datasets as tfds

    class TinyProse(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = tuple(tfds.core.BuilderConfig(name=name) for name in ("plain", "loud"))

        def _info(self):
            text = tfds.features.Text()
            features = {"text": text, "title": text, "year": np.int64}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(7), "test": self._generate_examples(1)}

        def _generate_examples(self, count):
            for i in range(count):
                text = f"{self.builder_config.name} text {count} {i}"
                yield i, {"text": text, "title": f"title {i}", "year": 2000 + i}

    directory = tmp_path_factory.mktemp("tfds")
    for name in ("plain", "loud"):
        builder = TinyProse(config=name, data_dir=directory, file_format="array_record")
        builder.download_and_prepare()
    return directory


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("tfds:tiny_prose/loud", {f"loud text 7 {i}" for i in range(7)}),
        ("tfds:tiny_prose/plain#title", {f"title {i}" for i in range(7)}),
    ],
)
def test_tfds_texts_are_read_without_tensorflow(tfds_dir, monkeypatch, spec, expected):
    monkeypatch.setattr(corpus, "_READ_AT_ONCE", 3)
    read = corpus.read_corpus(corpus.parse_source(spec, tfds_dir))
    assert set(texts_of(read.documents)) == expected
    assert len(read.documents) == 7


def test_tfds_errors_say_what_to_do(tfds_dir, tmp_path):
    with pytest.raises(ValueError, match=r"'year' is not one of its text keys, \['text', 'title'"):
        corpus.read_corpus(corpus.parse_source("tfds:tiny_prose/loud#year", tfds_dir))
    for spec, where in (("tfds:tiny_prose/loud", tmp_path), ("tfds:no_such_prose", tfds_dir)):
        source = corpus.parse_source(spec, where)
        with pytest.raises(FileNotFoundError, match="prepare it once") as caught:
            corpus.read_corpus(source)
        assert str(where) in str(caught.value)
        assert "\n" not in str(caught.value)
