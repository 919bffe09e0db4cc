"""Importing libraries of thousands of modules."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Extension modules that are not taken apart at the end are reported as leaks, in forty lines:
# https://nanobind.readthedocs.io/en/latest/refleaks.html
atexit.register(gc.unfreeze)


@contextmanager
def without_collection() -> Iterator[None]:
    """Import without garbage collections, and leave what is there at the end of the block out of all later ones.

    diffusers, transformers, PEFT and DeepSpeed make a million objects that live as long as the process; the collector
    would walk through them many times while they come and whenever it is due later. Frozen as before a fork:
    https://docs.python.org/3/library/gc.html#gc.freeze. `benchmarks/startup.py` measures it.
    """
    enabled = gc.isenabled()  # a program may have its own reasons to collect nothing
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
