"""One compiled program for all tests of training that a worker runs."""

import pytest

from tests.training_checks import programs_on_one_device


@pytest.fixture(scope="session")
def programs():
    return programs_on_one_device()
