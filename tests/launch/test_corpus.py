"""The program that builds the corpus, on packages made by hand; nothing is downloaded."""

import hashlib
import json
import subprocess
import sys

import pytest
from absl import flags

from launch import corpus
from launch.english.packages import Package
from qat.training import sources

WORDS = {"one": "Some words.\n", "deep/two": "More words here.\n"}


def texts(root):
    for path in sorted(root.iterdir()):
        yield from json.loads(path.read_text()).items()


def make_package(name, version="1.0"):
    return Package(name, version, "public domain", texts)


@pytest.fixture
def downloads(monkeypatch):
    """Packages by name; a version and their texts. The list of what was fetched."""
    available, fetched = {}, []

    def fetch(package, folder):
        fetched.append(package)
        if package not in available:
            raise OSError(f"apt-get download {package} failed")
        (folder / "root").mkdir(parents=True)
        (folder / "root" / "all.json").write_text(json.dumps(available[package][1]))
        return available[package][0]

    monkeypatch.setattr(corpus, "fetch", fetch)
    return available, fetched


def build(out, names, monkeypatch):
    monkeypatch.setattr(corpus, "PACKAGES", tuple(map(make_package, names)))
    flags.FLAGS(["corpus", f"--out={out}"])
    corpus.main(["corpus"])


def test_every_package_becomes_a_folder_of_texts(tmp_path, downloads, monkeypatch, capsys):
    available, _ = downloads
    available["a"] = ("1.0", {**WORDS, "empty": "", "table": "1 2 3 4\n"})
    available["b"] = ("2.0", {"only": "Other words.\n"})
    out = tmp_path / "deep" / "corpus"
    build(out, "ab", monkeypatch)
    found = [raw.decode() for raw in sources.parse_source(f"folder:{out}").read()]
    assert sorted(found) == sorted([*WORDS.values(), "Other words.\n"])
    manifest = corpus.read_manifest(out / "a")
    assert (manifest.version, manifest.documents, manifest.left_out) == ("1.0", 2, 1)
    joined = "".join(WORDS[name] for name in sorted(WORDS)).encode()
    assert (manifest.bytes, manifest.sha256) == (len(joined), hashlib.sha256(joined).hexdigest())
    assert sorted(path.name for path in out.iterdir()) == ["a", "b"]
    printed = capsys.readouterr().out
    assert "b: made for version 1.0, found 2.0" in printed
    assert "a: made for" not in printed
    assert f"--config.data.source=folder:{out}" in printed


def test_the_same_command_goes_on(tmp_path, downloads, monkeypatch):
    available, fetched = downloads
    available["a"] = ("1.0", WORDS)
    with pytest.raises(OSError, match="download b failed"):
        build(tmp_path, "ab", monkeypatch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    available["b"] = ("1.0", WORDS)
    build(tmp_path, "ab", monkeypatch)
    build(tmp_path, "ab", monkeypatch)
    assert fetched == ["a", "b", "b"]


@pytest.mark.parametrize("content", [None, "{", '{"package": "a"}'])
def test_folders_of_others_are_left_alone(tmp_path, downloads, monkeypatch, content):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").write_text("mine")
    if content:
        (tmp_path / "a" / ".manifest.json").write_text(content)
    with pytest.raises(ValueError, match="expected a folder of its own making"):
        build(tmp_path, "a", monkeypatch)
    assert (tmp_path / "a" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("found", [{}, {"a": ""}, {"a": "12 34"}])
def test_a_package_without_text_is_an_error(tmp_path, downloads, monkeypatch, found):
    downloads[0]["a"] = ("9.9", found)
    with pytest.raises(ValueError, match=r"package a 9\.9 has no text where version 1\.0 has it"):
        build(tmp_path, "a", monkeypatch)
    assert list(tmp_path.iterdir()) == []


def test_two_texts_of_one_name_are_an_error(tmp_path):
    package = Package("a", "1", "", lambda root: iter([("x", "words"), ("x", "words")]))
    with pytest.raises(ValueError, match="two texts are called 'x'"):
        corpus.store(package, "1", tmp_path, tmp_path / "a")


def fake(tmp_path, monkeypatch, name, script):
    """A program of this name that comes first."""
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent))


def test_without_apt_there_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"apt-get is missing: .* needs a Debian-like system"
    ):
        corpus.fetch("a", tmp_path / "a")


def test_the_reason_of_apt_is_passed_on(tmp_path, monkeypatch):
    script = "echo 'W: careful' >&2; echo 'E: Unable to locate package a' >&2; exit 100"
    fake(tmp_path, monkeypatch, "apt-get", script)
    with pytest.raises(OSError, match=r"download a failed: E: Unable to locate package a \(") as e:
        corpus.fetch("a", tmp_path / "a")
    assert "\n" not in str(e.value)


def test_a_package_is_downloaded_and_unpacked(tmp_path, monkeypatch):
    fake(tmp_path, monkeypatch, "apt-get", ': > "$2_1.0_all.deb"')
    fake(tmp_path, monkeypatch, "dpkg-deb", '[ "$1" = -f ] && echo 1:1.0 || /bin/mkdir "$3"')
    assert corpus.fetch("a", tmp_path / "a") == "1:1.0"
    assert (tmp_path / "a" / "root").is_dir()


def test_help_names_the_flag():
    command = [sys.executable, "-m", "launch.corpus", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "--out" in result.stdout
