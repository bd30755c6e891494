"""Cleaners of markup, against small pages and modules made by hand."""

import gzip
import struct
import textwrap
import zlib

import pytest

from launch.english import dictionary, markup, packages, pod, sword
from launch.english.tidy import is_prose, tidy, unwrap


def lines(text):
    return textwrap.dedent(text).lstrip("\n")


def test_tidy_drops_what_cannot_be_read():
    text = "\ufeffone\xa0two\x07\r\n=====\n\n\n\n  indented\u200b text  \n+---+---+\n\n"
    assert tidy(text) == "one two\n\n  indented text\n"
    assert tidy(" \n\x00\n") == ""
    assert tidy("if (a) {\n}\n\nb;\n") == "if (a) {\n}\n\nb;\n"


def test_unwrap_joins_the_lines_of_a_paragraph():
    assert unwrap("a b\n  c\n\n d\n \ne") == "a b c\n\nd\n\ne"


@pytest.mark.parametrize(
    ("text", "prose"),
    [
        ("Some words, and a few numbers: 12.\n", True),
        ("Où est l’œuvre ?", True),
        ("0x10 0x20 0x30 | 1 2 3\n", False),
        ("слова на другом языке", False),
        ("", False),
    ],
)
def test_prose_is_made_of_latin_words(text, prose):
    assert is_prose(text) == prose


def test_html_becomes_what_a_reader_sees():
    page = """
        <html><head><title>Title</title><style>p {}</style></head><body>
        <div class="related">next <p>previous</p></div>
        <nav>menu<br>more</nav>
        <div class="body" role="main">
        <h1>Cats &amp; dogs<a class="headerlink" href="#x">¶</a></h1>
        <p>A <em>short</em>
        sentence.<br>Next&nbsp;line.</p><ul><li>one</li><li>two</li></ul>
        <pre>if x:
            <span>y()</span></pre>
        <table><tr><th>name</th><td>value</td></tr><tr><td>a</td><td>b</td></tr></table>
        <div class="footer"><p>&copy; made by hand</div>
        </div></body></html>
    """
    assert markup.html_text(page).replace("\n\n", "\n") == lines(
        """
        Cats & dogs
        A short sentence.
        Next line.
        one
        two
        if x:
                    y()
        name\tvalue
        a\tb
        """
    ).replace("name\t", "\tname\t").replace("a\tb", "\ta\tb")


def test_html_that_is_not_closed_loses_nothing_but_what_is_skipped():
    page = "<p>one<p>two<form><p>button<b></form>three</i></p></pre> four <script>x<"
    assert markup.html_text(page).split() == ["one", "two", "three", "four"]


def test_pod_becomes_text():
    source = lines(
        """
        =encoding utf8

        =head1 NAME

        made - a B<bold> and I<slanted> page of C<< $a->{B<x>} >>

        =over 4

        =item *

        See L<perlre>, L<the list|perlfunc/splice>, L<perlop/"Quote"> and
        L<http://example.org/a/b>; 1 E<lt> 2 E<sol> E<eacute>.X<index>

        =item name

            $code = C<kept>;

        =back

        =begin html

        <b>dropped</b>

        =end html

        =cut
        """
    )
    assert pod.pod_text(source) == lines(
        """
        NAME

        made - a bold and slanted page of $a->{x}

        See perlre, the list, Quote and http://example.org/a/b; 1 < 2 / é.

        name

            $code = C<kept>;
        """
    )


def test_gcide_entries_become_sentences():
    entries = lines(
        r"""
        00-database-short
           A made-up dictionary

        Nothing before the first entry counts.

        Hut \Hut\ (h[u^]t), n. [OE. hutte; akin to {H[=a]t}, {Cot
           house}.]
           A small h[ae]use. [Obs.]
           [1913 Webster]

                 A hut of m['e]tal and [root]2.       --Nobody.
           [WordNet 1.5 +PJC]
        """
    )
    assert dictionary.gcide_text(entries) == lines(
        """
        Hut, n. [OE. hutte; akin to Hāt, Cot house.] A small hæuse. [Obs.]

        A hut of métal and √2. --Nobody.
        """
    )


def test_foldoc_entries_lose_braces_and_dates():
    entries = lines(
        """
        00-database-info
           About it.

        made up

           <jargon> Said of a {format
           test}.

           [{Jargon File}]

           (1999-12-31)
        """
    )
    assert dictionary.foldoc_text(entries) == "made up\n\n<jargon> Said of a format test.\n"


def module(folder, width):
    """A module of two chapters; the second and third verse share an entry, the fourth is empty."""
    chapters = [b"<title>One</title>First verse.<note>no</note>", b"Shared &amp; kept.<p/>Last."]
    cut = len(b"<title>One</title>")
    record = struct.Struct("<IIH" if width == 10 else "<III")
    places = [(0, 0, cut), (0, cut, len(chapters[0]) - cut)]
    places += 2 * [(1, 0, 18)] + [(1, 18, len(chapters[1]) - 18), (0, 0, 0)]
    streams, offset = [], 0
    for chapter in chapters:
        packed = zlib.compress(chapter)
        streams.append((offset, len(packed), len(chapter), packed))
        offset += len(packed)
    folder.mkdir()
    (folder / "nt.bzz").write_bytes(b"".join(each[3] for each in streams))
    (folder / "nt.bzs").write_bytes(b"".join(struct.pack("<III", *each[:3]) for each in streams))
    (folder / "nt.bzv").write_bytes(b"".join(record.pack(*place) for place in places))
    for suffix in "zsv":
        (folder / f"ot.bz{suffix}").write_bytes(b"")
    return folder


@pytest.mark.parametrize("width", [10, 12])
def test_sword_modules_of_both_widths(tmp_path, width):
    assert dict(sword.module_texts(module(tmp_path / "m", width))) == {
        "nt-000": "One\n\nFirst verse.\n",
        "nt-001": "Shared & kept.\n\nLast.\n",
    }


def test_damaged_sword_modules_are_named(tmp_path):
    folder = module(tmp_path / "a", 12)
    (folder / "nt.bzv").write_bytes(b"\xff" * 24)
    with pytest.raises(ValueError, match=r"nt\.bzs: its verses are not those"):
        list(sword.module_texts(folder))
    folder = module(tmp_path / "b", 10)
    (folder / "nt.bzz").write_bytes((folder / "nt.bzz").read_bytes()[:-9])
    with pytest.raises(ValueError, match="stream 1 is damaged"):
        list(sword.module_texts(folder))


def test_packages_read_the_files_they_name(tmp_path):
    by_name = {package.name: package for package in packages.PACKAGES}
    assert len(by_name) == len(packages.PACKAGES)
    html = tmp_path / "usr/share/doc/python3.11/html"
    (html / "library").mkdir(parents=True)
    for name in ("index", "library/json", "genindex", "genindex-A"):
        (html / f"{name}.html").write_text(f"<p>page {name}</p>")
    assert dict(by_name["python3.11-doc"].texts(tmp_path)) == {
        "index": "page index\n",
        "library/json": "page library/json\n",
    }
    (tmp_path / "usr/share/dictd").mkdir()
    with gzip.open(tmp_path / "usr/share/dictd/foldoc.dict.dz", "wb") as file:
        file.write(b"word\n\n   Meaning.\n")
    assert dict(by_name["dict-foldoc"].texts(tmp_path)) == {"foldoc": "word\n\nMeaning.\n"}
