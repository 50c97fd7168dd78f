"""Parts of a GPU suite that go wrong in every way; each process of the suite imports them by name."""

import os
import signal
import time


def crashing(suite):
    """Its second block takes the process with it."""

    def crash():
        os.kill(os.getpid(), signal.SIGSEGV)

    return {"before": lambda: {"value": 1}, "crash": crash, "after": lambda: {"value": 3}}


def hanging(suite):
    """Its first block starts another process and never ends."""

    def hang():
        child = os.fork()
        if child:
            print(f"started {child}", flush=True)
        while True:
            time.sleep(60)

    return {"hang": hang}


def raising(suite):
    """Its first block raises, once; its second one has numbers, but not all."""

    def fails():
        if "RECOVERED" in os.environ:
            return {"value": 1}
        raise ValueError("out of luck\nand more")

    return {"raises": fails, "partly": lambda: {"value": 2, "error": "torch: out of memory"}}


def kernel(suite):
    """Takes the place of the first part."""
    return {"probe": lambda: {"missing": os.environ.get("MISSING")}}


def asks(suite):
    """What a later part is told."""
    return {"told": lambda: {"kernel": suite.kernel, "forms": suite.forms(128, "associative", "fused")}}
