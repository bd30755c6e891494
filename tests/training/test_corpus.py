"""Documents, their split and what identifies them, against hashes made by hand."""

import hashlib
import itertools

import pytest

from qat.training import corpus, sources

TEXTS = [f"document {i}\n" + "words, words\n" * (i % 7) for i in range(400)]


def make_source(texts, name="made"):
    return sources.Source(name, lambda: [text.encode() for text in texts])


def texts_of(texts):
    return [document.text for document in corpus.documents(make_source(texts))]


def survey(texts, folder):
    return corpus.survey(make_source(texts), folder)


def position(text):  # of the hash in [0, 1)
    return int(hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), 16) / 16**32


def sides(texts, fraction):
    both = ([], [])
    for document in corpus.documents(make_source(texts)):
        both[corpus.is_validation(document, fraction)].append(document.text)
    return both


def test_documents_come_in_reading_order():
    assert texts_of(TEXTS) == TEXTS


def test_the_side_is_the_hash_of_the_content():
    train, validation = sides(TEXTS, 0.05)
    assert set(validation) == {text for text in TEXTS if position(text) < 0.05}
    assert sorted(train + validation) == sorted(TEXTS)
    assert 5 <= len(validation) <= 40  # 20 expected; more than three standard deviations either way


def test_a_larger_fraction_only_moves_documents_to_validation():
    found = [set(sides(TEXTS, fraction)[1]) for fraction in (0.01, 0.05, 0.3, 0.9)]
    assert all(small < large for small, large in itertools.pairwise(found))


def test_copies_lie_on_one_side():
    train, validation = sides(TEXTS * 2, 0.3)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(TEXTS * 2)


def test_long_texts_are_cut_after_lines_without_loss(monkeypatch):
    monkeypatch.setattr(corpus, "SECTION_CHARACTERS", 10)
    text = "ab\ncdefgh\n" + "x" * 25 + "\nlast"
    assert texts_of([text]) == ["ab\ncdefgh\n", "x" * 10, "x" * 10, "x" * 5 + "\nlast"]
    monkeypatch.setattr(corpus, "SECTION_CHARACTERS", 20)
    assert texts_of(["y" * 20]) == ["y" * 20]


def test_a_survey_counts_what_is_there_and_what_is_not(tmp_path, caplog):
    raw = [
        b"one",
        b"",
        "zwei α".encode(),
        b"\xff\xfe",
        "caf\xe9".encode("latin-1"),
        b"nul\0byte",
        b"",
    ]
    found = corpus.survey(sources.Source("mixed", lambda: raw), tmp_path)
    assert (found.documents, found.characters) == (2, 3 + 6)
    assert (found.unreadable, found.empty) == (3, 2)
    assert "left out 3 documents" in caplog.text


def test_a_corpus_without_text_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no text: 0 unreadable and 1 empty"):
        survey([""], tmp_path)


def test_the_content_is_that_of_the_texts_in_their_order(tmp_path):
    digests = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in TEXTS]
    found = survey(TEXTS, tmp_path)
    assert found.content == hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()
    others = [TEXTS[:-1], [*TEXTS, TEXTS[0]], [*TEXTS[:-1], TEXTS[-1] + " "], TEXTS[::-1]]
    contents = {survey(texts, tmp_path).content for texts in others}
    assert len(contents | {found.content}) == 5


def test_a_moved_folder_is_the_same_corpus(tmp_path):
    contents = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i, text in enumerate(TEXTS[:9]):
            (tmp_path / name / f"{i}.txt").write_text(text)
        source = sources.parse_source(f"folder:{tmp_path / name}")
        contents.add(corpus.survey(source, tmp_path / "kept").content)
    assert contents == {survey(TEXTS[:9], tmp_path).content}


def test_an_unchanged_corpus_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SETTLED_NS", -10 * 1_000_000_000)
    folder, kept = tmp_path / "corpus", tmp_path / "kept"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    reads = []

    def read():
        reads.append(1)
        return [(folder / "a.txt").read_bytes()]

    source = sources.Source("counted", read, lambda: [folder / "a.txt"])
    first = corpus.survey(source, kept)
    assert corpus.survey(source, kept) == first
    assert len(reads) == 1
    (folder / "a.txt").write_text("two")
    second = corpus.survey(source, kept)
    assert len(reads) == 2
    assert second.content != first.content


def test_a_corpus_that_just_changed_is_read_again(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    source = sources.parse_source(f"folder:{tmp_path}")
    corpus.survey(source, tmp_path / ".kept")
    assert not (tmp_path / ".kept").exists()


def test_a_sample_is_of_training_documents_and_about_its_size(tmp_path):
    source, fraction = make_source(TEXTS), 0.2
    found = survey(TEXTS, tmp_path)
    train = sides(TEXTS, fraction)[0]
    assert list(corpus.sample(source, found, fraction, 10**9)) == train
    some = list(corpus.sample(source, found, fraction, found.characters // 4))
    assert set(some) < set(train)
    assert sum(map(len, some)) == pytest.approx(found.characters / 4, rel=0.3)
    again = corpus.sample(make_source(TEXTS[::-1]), found, fraction, found.characters // 4)
    assert sorted(again) == sorted(some)
