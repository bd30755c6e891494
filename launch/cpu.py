"""Settings of the process that make small models train faster on CPU; to be called first."""

import ctypes
import os
import sys
from collections.abc import Collection

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> None:
    """Tells glibc's allocator to keep what is freed instead of returning it to the system.

    XLA allocates a step's buffers anew at every step. Above 32 MB glibc asks the system for them
    each time, which clears every page first: up to half of a small model's training time.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # not glibc
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_ARENA_MAX, 1)  # other arenas cannot hold large blocks
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 64 * 2**20)


def cores() -> list[int]:
    """Processor cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def stay_on(cores: Collection[int]) -> set[int]:
    """Pins the process, where that can be done; returns where it was before.

    To be called before JAX is used: on one core, XLA makes one thread.
    """
    if not hasattr(os, "sched_setaffinity"):
        return set()
    before: set[int] = os.sched_getaffinity(0)
    if cores:
        os.sched_setaffinity(0, cores)
    return before


def keep_compiled(folder: str) -> None:
    """Lets all processes share what XLA compiled, by files, unless the environment says where."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
