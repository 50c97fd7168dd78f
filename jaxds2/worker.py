"""A process that does a part of another's work: Ctrl-C it leaves to that one, and it does not outlive it."""

import multiprocessing
import os
import signal
import threading


def prepare_worker() -> None:
    """To be called first in a process that `multiprocessing` started.

    Without it a worker of a pool whose parent was killed would go on with what is queued, and then wait for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
