"""A corpus small enough to prepare in every test, and runs that stop again and again."""

import contextlib
import itertools

import pytest

from launch import training


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(60):
        words = " ".join(f"{index} times {k} is {index * k}." for k in range(40))
        (folder / f"{index}.txt").write_text(words)
    return folder


@pytest.fixture
def stopping(monkeypatch):
    """Makes runs stop at every so manyth step."""

    def stopping(every):
        questions = itertools.count(1)

        @contextlib.contextmanager
        def preemption():
            yield lambda: next(questions) % every == 0

        monkeypatch.setattr(training, "Preemption", preemption)

    return stopping
