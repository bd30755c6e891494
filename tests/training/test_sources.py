"""Supplies of documents, against files written by hand."""

import gzip
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import zstandard

from qat.training import sources

TEXTS = ["first\ntext", "zweiter Text, äöü", "", 'third "text"', "\N{GREEK SMALL LETTER ALPHA}"]


def read(spec, data_dir=None):
    return list(sources.parse_source(spec, data_dir).read())


def lines(texts=TEXTS, **extra):
    return "".join(json.dumps({"text": text, **extra}) + "\n" for text in texts).encode()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("stdlb", "unknown source 'stdlb'.*nearest is 'stdlib'"),
        ("foldr:/tmp", "nearest is 'folder'"),
        ("json:/tmp", "nearest is 'jsonl'"),
        ("tdfs:lm1b", "nearest is 'tfds'"),
        ("", "unknown source ''"),
        ("x" * 300, "unknown source 'xxx"),
        ("stdlib:3.11", "takes no argument"),
        ("folder", "names nothing to read; expected 'folder:"),
        ("tfds:", "names nothing to read; expected 'tfds:"),
    ],
)
def test_unknown_sources_name_the_nearest_spelling(spec, message):
    with pytest.raises(ValueError, match=message):
        sources.parse_source(spec)


@pytest.mark.parametrize(
    ("spec", "meant"), [("my", "folder:my"), ("my/a.jsonl.gz", "jsonl:my/a.jsonl.gz")]
)
def test_a_bare_path_is_told_its_kind(tmp_path, monkeypatch, spec, meant):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="nearest is"):
        sources.parse_source(spec)  # there is no such path yet
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "a.jsonl.gz").touch()
    with pytest.raises(ValueError, match=f"nearest is '{meant}'"):
        sources.parse_source(spec)


def test_folder_reads_visible_files_in_the_order_of_their_names(tmp_path):
    contents = {
        "b.txt": b"2",
        "a.txt": b"1",
        "deep/er/README": b"4",
        "deep/b.md": b"3",
        "empty.py": b"",
        ".hidden.txt": b"hidden",
        ".git/config": b"hidden",
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert read(f"folder:{tmp_path}") == [b"1", b"2", b"", b"3", b"4"]


def test_a_large_file_is_read_in_pieces_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_PIECE_BYTES", 10)
    contents = [b"one\ntwo\nthree\nfour", b"no_line but words here", b"0123456789" * 3, b"x" * 10]
    for i, content in enumerate(contents):
        (tmp_path / f"{i}").write_bytes(content)
    pieces = read(f"folder:{tmp_path}")
    assert b"".join(pieces) == b"".join(contents)
    assert all(0 < len(piece) <= 10 for piece in pieces)
    assert pieces[:3] == [b"one\ntwo\n", b"three\n", b"four"]
    assert pieces[3:6] == [b"no_line ", b"but words ", b"here"]


def test_missing_folders_and_those_of_prepared_data_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        read(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read(f"jsonl:{tmp_path / 'nowhere'}")
    for kind in ("folder", "jsonl"):
        with pytest.raises(ValueError, match="lies in the corpus"):
            read(f"{kind}:{tmp_path}", tmp_path / "data")


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0)
    if os.access(closed, os.R_OK):
        pytest.skip("this user may list every folder")
    with pytest.raises(PermissionError):
        read(f"folder:{tmp_path}")


def test_stdlib_is_the_library_without_tests_and_packages():
    root = Path(sysconfig.get_path("stdlib"))
    unwanted = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    expected = [
        path.read_bytes()
        for path in root.rglob("*.py")
        if not unwanted & set(path.relative_to(root).parts)
    ]
    assert len(expected) > 500
    assert sorted(read("stdlib")) == sorted(expected)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "ndjson", "json.gz", "jsonl.zst"])
def test_json_lines_of_every_suffix(tmp_path, suffix):
    raw = lines(id=7, metadata={"text": "not this"}) + b"\n  \n"
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(suffix[-3:].lstrip("."), bytes)
    (tmp_path / f"part.{suffix}").write_bytes(pack(raw))
    (tmp_path / "README.md").write_text("no JSON")
    for spec in (f"jsonl:{tmp_path}", f"jsonl:{tmp_path / f'part.{suffix}'}"):
        assert [text.decode() for text in read(spec)] == TEXTS


def test_zst_of_several_frames_and_lines_across_chunks(tmp_path):
    random = np.random.default_rng(0)
    texts = ["".join(map(chr, random.integers(0x21, 0x24F, 1500))) for _ in range(900)]
    raw = lines(texts)
    cut = len(raw) // 3
    frames = zstandard.compress(raw[:cut]) + zstandard.compress(raw[cut:])
    assert len(frames) > 1 << 20
    (tmp_path / "a.json.zst").write_bytes(frames)
    assert [text.decode() for text in read(f"jsonl:{tmp_path}")] == texts


def test_half_a_character_makes_no_utf8(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "\\ud800"}\n')
    (raw,) = read(f"jsonl:{tmp_path}")
    with pytest.raises(UnicodeDecodeError):
        raw.decode()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"txt": "a", "id": 1}', "found the keys id, txt"),
        (b'{"text": 3}', "expected an object with a string under 'text'"),
        (b"[1]", "found no object"),
        (b'{"text": "a"', "expected one JSON object"),
        (b"\xff", "expected one JSON object"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "a.json").write_bytes(lines() + line + b"\n")
    with pytest.raises(ValueError, match=rf"a\.json line 6: .*{message}") as caught:
        read(f"jsonl:{tmp_path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["short", "flipped", "other"])
def test_damaged_files_are_named(tmp_path, suffix, damage):
    random = np.random.default_rng(1)
    raw = lines(["".join(map(chr, random.integers(0x21, 0x7F, 300))) for _ in range(100)])
    whole = bytearray((gzip.compress if suffix == "gz" else zstandard.compress)(raw))
    if damage == "flipped":
        whole[len(whole) // 2] ^= 0xFF
        whole[-6] ^= 0xFF  # of the checksum
    damaged = {"short": whole[:-20], "flipped": whole, "other": lines()}[damage]
    (tmp_path / f"a.json.{suffix}").write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"a\.json\.{suffix}"):
        read(f"jsonl:{tmp_path}")


def test_a_folder_without_json_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"has no file that ends in \.json"):
        read(f"jsonl:{tmp_path}")


def settle(monkeypatch):
    """Files of this test count as old."""
    monkeypatch.setattr(sources, "_SETTLED_NS", -10 * 1_000_000_000)


def test_the_stamp_follows_every_change(tmp_path, monkeypatch):
    settle(monkeypatch)
    folder = tmp_path / "corpus"
    folder.mkdir()
    path = folder / "a.txt"
    path.write_text("one")
    source = sources.parse_source(f"folder:{folder}")
    first = sources.stamp(source)
    assert first == sources.stamp(source)

    seen = {first}

    def changed():
        stamp = sources.stamp(source)
        assert stamp not in seen
        seen.add(stamp)

    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_text("two")  # of the same size, and its time set back
    os.utime(path, ns=times)
    changed()
    (folder / "b.txt").write_text("more")
    changed()
    (folder / "b.txt").rename(folder / "c.txt")
    changed()
    path.touch()
    changed()


def test_what_just_changed_has_no_stamp(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    assert sources.stamp(sources.parse_source(f"folder:{tmp_path}")) is None
    assert sources.stamp(sources.Source("made up", lambda: [b"text"])) is None
    assert sources.stamp(sources.parse_source("stdlib"))


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """Datasets in the shape of C4 and Dolma, prepared as anyone would prepare one."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text()

    class C4(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("3.0.1")
        BUILDER_CONFIGS = tuple(tfds.core.BuilderConfig(name=name) for name in ("en", "loud"))

        def _info(self):
            features = {"text": text, "url": text, "content-length": text, "year": np.int64}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(7), "validation": self._generate_examples(1)}

        def _generate_examples(self, count):
            for i in range(count):
                text = f"{self.builder_config.name} text {count} {i}"
                yield i, {"text": text, "url": f"u{i}", "content-length": "9", "year": 2000 + i}

    class Dolma(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"id": text, "text": text, "attributes": {"source": text}}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(5):
                yield i, {"id": str(i), "text": f"dolma {i}", "attributes": {"source": "s"}}

    directory = tmp_path_factory.mktemp("tfds")
    builders = [
        C4(config=name, data_dir=directory, file_format="array_record") for name in ("en", "loud")
    ]
    builders.append(Dolma(data_dir=directory, file_format="array_record"))
    for builder in builders:
        builder.download_and_prepare()
    return directory


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("tfds:c4/en", {f"en text 7 {i}" for i in range(7)}),
        ("tfds:c4/loud:3.0.1", {f"loud text 7 {i}" for i in range(7)}),
        ("tfds:c4/en#url", {f"u{i}" for i in range(7)}),
        ("tfds:dolma", {f"dolma {i}" for i in range(5)}),
    ],
)
def test_tfds_texts(tfds_dir, monkeypatch, spec, expected):
    monkeypatch.setattr(sources, "_READ_AT_ONCE", 3)
    settle(monkeypatch)
    source = sources.parse_source(spec, tfds_dir)
    texts = [raw.decode() for raw in source.read()]
    assert len(texts) == len(expected)
    assert set(texts) == expected
    assert all(path.is_file() for path in source.files())
    assert sources.stamp(source)


def test_tfds_is_read_by_its_files_alone_and_without_tensorflow(tfds_dir):
    code = """
        import sys
        from qat.training import sources
        source = sources.parse_source("tfds:c4/en", sys.argv[1])
        assert sum(1 for _ in source.read()) == 7
        sys.exit("tensorflow" in sys.modules)
    """
    repository = Path(__file__).parents[2]
    code = "\n".join(line.strip() for line in code.splitlines())
    subprocess.run([sys.executable, "-c", code, tfds_dir], cwd=repository, check=True)


def test_tfds_errors_say_what_to_do(tfds_dir, tmp_path):
    with pytest.raises(ValueError, match=r"'year' is not one of its text keys, \['content-le"):
        read("tfds:c4/en#year", tfds_dir)
    for spec, where in (("tfds:c4/en", tmp_path), ("tfds:no_such_prose", tfds_dir)):
        with pytest.raises(FileNotFoundError, match="prepare it once") as caught:
            read(spec, where)
        assert str(where) in str(caught.value)
        assert "\n" not in str(caught.value)
