"""Every test runs strict: eight virtual devices, no silent promotion, annotations checked.

Most of the tests' time goes into compiling, so what one process compiled is read by all others: the
workers of pytest-xdist and the programs that tests start. Most optimizations are left out as well,
but for programs and for modules that use the fixture `optimized`, whose tests compute for long.
"""

import os
import tempfile

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit the folder
    _compiled = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import jaxtyping
import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell's background, by inheritance
    signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)

hypothesis.settings.register_profile("deterministic", deadline=None, derandomize=True)
hypothesis.settings.load_profile("deterministic")

# Whose annotations are checked, as PEP 484 has them: an int is a float.
CHECKED = [
    "qat.grid",
    "qat.formats",
    "qat.noise",
    "qat.quantizer",
    "qat.groups",
    "qat.scales",
    "qat.quantization",
    "qat.calibration",
    "qat.policy",
    "qat.native",
    "qat.dot_general",
    "qat.einsum",
    "qat.convolution",
    "qat.contractions",
    "qat.packing",
    "qat.storage",
    "qat.linen.calls",
    "qat.linen.state",
    "qat.linen.conversion",
    "qat.nnx",
    "qat.rotation",
    "qat.ptq.rtn",
    "qat.ptq.gptq",
    "qat.ptq.hqq",
    "qat.ptq.awq",
    "qat.ptq.smoothquant",
    "qat.ptq.statistics",
]
jaxtyping.install_import_hook(
    CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules in folders, which take longest, come first, so that all processes end together."""
    items.sort(key=lambda item: item.path.parent == Path(__file__).parent)


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
    """Compiles as users do."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def unchecked_annotations() -> Iterator[None]:
    """Lets wrong types through to the code under test, whose own error is the claim."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
