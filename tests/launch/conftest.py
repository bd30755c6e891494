"""A corpus of arithmetic, small enough to prepare in every test."""

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(60):
        words = " ".join(f"{index} times {k} is {index * k}." for k in range(40))
        (folder / f"{index}.txt").write_text(words)
    return folder
