"""Tokenizers, against Hugging Face's own encoder of the same merges."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qat.training import byte_pairs, tokenizer
from qat.training.tokenizer import from_json, parse_tokenizer

SIZE = 600
SPLIT = r"\p{N}{1,3}|\p{L}+|[^\p{N}\p{L}]+"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
CODE = st.text(st.sampled_from(list("aesr d\n\t'.=()1é—")), max_size=200)


def prose():
    library = Path(sysconfig.get_path("stdlib"))
    return [(library / name).read_text() for name in ("argparse.py", "typing.py", "ast.py")]


@pytest.fixture(scope="module")
def learned():
    return parse_tokenizer(f"bpe:{SIZE}").fit(prose)


def huggingface(vocabulary_size=SIZE, split=None, special=()):
    """Trained by the other library's own means."""
    other = tokenizers.Tokenizer(tokenizers.models.BPE())
    pre = tokenizers.pre_tokenizers
    bytes_ = pre.ByteLevel(add_prefix_space=False, use_regex=split is None)
    cut = pre.Split(tokenizers.Regex(split), "isolated") if split else None
    other.pre_tokenizer = pre.Sequence([cut, bytes_]) if split else bytes_
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=pre.ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    other.train_from_iterator(prose(), trainer)
    return other


def stored(tmp_path, other, **changes):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(other.to_str()), **changes}))
    return str(path)


@pytest.fixture(scope="module")
def reference():
    return huggingface(SIZE - 1)


@pytest.fixture(scope="module")
def with_split(tmp_path_factory):
    other = huggingface(split=SPLIT, special=["<pad>", "</s>"])
    return parse_tokenizer(stored(tmp_path_factory.mktemp("split"), other)), other


@pytest.fixture(scope="module")
def with_digits(tmp_path_factory):
    """Every digit is a word of its own, as in SmolLM2."""
    pre = tokenizers.pre_tokenizers
    other = huggingface()
    digits = pre.Digits(individual_digits=True)
    other.pre_tokenizer = pre.Sequence([digits, pre.ByteLevel(add_prefix_space=False)])
    return parse_tokenizer(stored(tmp_path_factory.mktemp("digits"), other)), other


@settings(max_examples=200)
@given(st.text(st.sampled_from(list("ab \n\t'.s123²½٣é—")), max_size=40) | TEXT)
@example("  12\n\n 3  four 5's\n")
def test_digits_are_words_of_their_own(with_digits, text):
    ours, other = with_digits
    assert ours.encode(text).tolist() == other.encode(text).ids
    assert ours.decode(ours.encode(text)) == text


@settings(max_examples=200)
@given(TEXT | CODE)
@example("")
@example("  \n\n \t x  ")
@example("don't '''we'll'''")
@example("<|endoftext|></s>")
@example("1234567 ١٢٣ ⅷ")
@example("\ufeff\u200b\U0001f600\U0001f468\u200d\U0001f469")
@example(" " * 70_000)
def test_ids_are_those_of_the_other_library(learned, reference, with_split, text):
    ids = learned.encode(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == reference.encode(text, add_special_tokens=False).ids
    assert learned.decode(ids) == text
    split, other = with_split
    assert split.decode(split.encode(text)) == text
    if "</s>" not in text:  # there the text means the special token
        assert split.encode(text).tolist() == other.encode(text).ids


def test_the_separator_is_an_id_of_no_text(learned, with_split):
    assert (learned.vocabulary_size, learned.separator) == (SIZE, SIZE - 1)
    split, other = with_split
    assert split.separator == other.token_to_id("</s>")
    assert split.vocabulary_size == SIZE
    for each in (learned, split, tokenizer.Bytes()):
        text = "a </s> b <pad>"
        ids = each.encode(text)
        assert each.separator not in ids
        assert each.decode(np.append(ids, each.separator).astype(np.int32)) == text + "\0"


def test_every_id_decodes(learned, with_split):
    for each in (learned, with_split[0], tokenizer.Bytes()):
        for i in range(each.vocabulary_size):
            assert isinstance(each.decode(np.asarray([i])), str)


def test_learning_is_a_function_of_the_texts_alone(learned):
    again = parse_tokenizer(f"bpe:{SIZE}").fit(lambda: prose()[::-1])
    assert again == learned
    assert again.identity == learned.identity
    other = parse_tokenizer(f"bpe:{SIZE}").fit(lambda: prose()[:2])
    assert other.identity != learned.identity


def test_merges_are_of_the_most_frequent_pairs():
    found = parse_tokenizer("bpe:259").fit(lambda: ["abababab abcabc"] * 10)
    assert found.tokens[256:] == (b"ab", b"abab", b"")


@pytest.mark.parametrize(
    ("size", "dtype"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)]
)
def test_ids_have_the_smallest_type(size, dtype):
    tokens = [bytes([i]) for i in range(256)] + [b""] * (size - 256)
    pairs = byte_pairs.BytePairs("made", tuple(tokens), byte_pairs.WORDS, size - 1)
    assert pairs.encode("text").dtype == dtype


def test_json_keeps_all(learned, with_split):
    for each in (learned, with_split[0], tokenizer.Bytes()):
        again = from_json(json.loads(json.dumps(each.to_json())))
        assert again == each
        assert again.identity == each.identity
        assert again.fit(list) is again


def test_identity_is_of_contents_not_of_names(tmp_path, reference):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = (parse_tokenizer(stored(tmp_path / name, reference)) for name in "ab")
    assert one.name != two.name
    assert one.identity == two.identity
    assert one.identity != parse_tokenizer(stored(tmp_path / "a", huggingface(500))).identity


def test_bytes():
    text = "naïve\0 α\n"
    ids = tokenizer.Bytes().encode(text)
    assert ids.dtype == np.uint8
    assert ids.tolist() == list(b"na\xc3\xafve \xce\xb1\n")
    assert tokenizer.Bytes().decode(ids) == "naïve α\n"
    assert tokenizer.Bytes().decode(ids[:3]) == "na\ufffd"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("byts", "unknown tokenizer 'byts'.*nearest is 'bytes'"),
        ("bpe8192", "nearest is 'bpe:8192'"),
        ("gpt2", "unknown tokenizer 'gpt2'"),
        ("bpe:", "expected 'bpe:N' with N from 257"),
        ("bpe:256", "expected 'bpe:N' with N from 257"),
        ("bpe:8k", "expected 'bpe:N'"),
        ("bpe:99999999999", "to 16777216"),
    ],
)
def test_unknown_tokenizers(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_tokenizer(spec)


def test_a_corpus_with_too_few_pairs_is_an_error():
    with pytest.raises(ValueError, match=r"pairs for 259 ids only; .* at most 'bpe:259'"):
        parse_tokenizer("bpe:1000").fit(lambda: ["abab"] * 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, "it has a normalizer, NFC"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no ByteLevel pre-tokenizer"),
        ({"pre_tokenizer": None}, "no ByteLevel pre-tokenizer"),
        ({"model": {"type": "Unigram"}}, "a model of type Unigram"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "byte_fallback True"),
        (
            {"added_tokens": [{"id": 3, "content": "word", "special": False}]},
            "an added token that is not special, 'word'",
        ),
        ({"model": {"type": "BPE", "vocab": {"\u4e16": 0}, "merges": []}}, "is no byte"),
        (
            {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
            "ids for all bytes of ASCII text",
        ),
        ({"model": {"type": "BPE", "merges": []}}, "is damaged: KeyError"),
    ],
)
def test_other_kinds_of_files_are_refused_with_the_reason(tmp_path, reference, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_tokenizer(stored(tmp_path, reference, **changes))
    assert "tokenizer.json" in str(caught.value)


def test_merges_out_of_order_are_refused(tmp_path, reference):
    model = json.loads(reference.to_str())["model"]
    model["merges"].reverse()
    with pytest.raises(ValueError, match="in the order of the merges"):
        parse_tokenizer(stored(tmp_path, reference, model=model))


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        parse_tokenizer(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="is not byte-level byte-pair encoding"):
        parse_tokenizer(str(tmp_path / "tokenizer.json"))
