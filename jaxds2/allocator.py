"""How this process's memory goes back to the operating system."""

import ctypes
import os
import sys
from importlib.metadata import entry_points

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def on_cpus() -> bool:
    """Whether JAX will compute on CPUs: it is told to, or finds no other platform installed. Does not start JAX."""
    return os.environ.get("JAX_PLATFORMS") == "cpu" or not entry_points(group="jax_plugins")


def keep_pages() -> bool:
    """Have the C library keep the pages that it frees, for the next step's temporaries.

    On a CPU XLA allocates its temporaries anew in every step. glibc gives blocks this large back at once, so that each
    step has its pages zeroed and mapped again, a quarter of its time (docs/performance.md). Call it before other
    threads start; what the environment says (`MALLOC_MMAP_MAX_`) is overridden. A model whose step needs far less than
    64 MiB, such as the demo's, loses instead: its threads wait for each other at the one heap.

    Returns:
      Whether it could be set: on Linux with glibc.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    # One heap for all threads, since a thread's own takes blocks of at most 64 MiB; never by mmap, which free() undoes;
    # never trim the heap's end.
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
    return all(mallopt(name, value) for name, value in settings)
