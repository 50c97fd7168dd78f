"""A line from each process of a run to process 0, kept open: over it all learn that one has failed, and why.

A process that fails alone leaves the others waiting in a sum over the devices for a part that never comes. So it says
why before it leaves, process 0 passes it on, and all end. The kernel closes the line of one that was killed.
"""

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Mapping

GRACE = 5.0
"""Seconds that a process has to end by itself, when it has heard that another failed."""

FAILED, LOST = 1, 75
"""Exit codes of those that cannot go on: for an error, which would come again; where one is gone without a word, which
may go well when all start again from the last checkpoint."""

LATEST = 1800.0
"""Seconds that a process waits at its end for the last of the others: the first may still write the report of a large
evaluation, or a checkpoint to a slow disk."""

_SILENT = (
    "killed, out of memory, or its host or network is down, or it was stopped before it trained; nothing was heard of "
    "it any more"
)


class Lifeline:
    """This process' end of the lines, inside a `with` block."""

    def __init__(self, process: int, peers: Mapping[int, socket.socket], *, grace_s: float = GRACE):
        """Watch over the open connections.

        Args:
          process: the number of this one.
          peers: of process 0 a connection to each other, of another the one to process 0. They are closed at the end.
          grace_s: so long after another has failed this process is ended, if it still is in the block.
        """
        self._process, self._peers, self._grace = process, dict(peers), grace_s
        self._change = threading.Condition()
        self._failure: str | None = None
        self._code = FAILED
        self._done: set[int] = set()
        self._gone: set[int] = set()
        self._ended = False
        self._woken, self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._listen, name="lifeline", daemon=True)

    def __enter__(self) -> "Lifeline":
        for peer in self._peers.values():
            # A host that is gone says nothing: ask it when all is silent. Where there are no such options, after hours.
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
                if hasattr(socket, name):
                    peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            peer.settimeout(None)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._ended = True
        self._wake.close()
        self._thread.join()
        self._woken.close()
        for peer in self._peers.values():
            peer.close()

    def failure(self, wait_s: float = 0.0) -> str | None:
        """`process I failed: why` of the first other process that did, waiting for it so long; None: none did."""
        with self._change:
            self._change.wait_for(lambda: self._failure is not None, wait_s)
            return self._failure

    @property
    def code(self) -> int:
        """With what this process leaves once another has failed: FAILED or LOST."""
        return self._code

    def tell(self, why: str) -> None:
        """Say to all others that this process fails; process 0 stays until they have left.

        jax.distributed ends a process with a stack trace, at once, when it hears nothing of process 0 any more.
        """
        self._send(f"failed {self._process} {' '.join(why.split())}", self._peers)
        if self._process == 0:
            with self._change:
                self._change.wait_for(lambda: self._gone >= set(self._peers), 2 * self._grace)

    def finish(self, *, latest_s: float = LATEST) -> str | None:
        """Wait until every process has come to its end; returns what `failure` does.

        One that is `latest_s` seconds later than process 0 has failed, and all hear it; the others wait twice as long
        for process 0.
        """
        if self._process:
            self._send("done", self._peers)
        wait_s = 2 * latest_s if self._process else latest_s
        with self._change:
            self._change.wait_for(lambda: self._failure is not None or self._done >= set(self._peers), wait_s)
            if self._failure is None:
                if late := sorted(set(self._peers) - self._done):
                    why = f"it has not come to its end {wait_s:g} s after process {self._process} did"
                    self._failure = f"process {late[0]} failed: {why}"
                    self._send(f"failed {late[0]} {why}", self._peers)
                elif not self._process:
                    self._send("done", self._peers)
            return self._failure

    def _send(self, line: str, to: Mapping[int, socket.socket]) -> None:
        for peer in to.values():
            with contextlib.suppress(OSError):  # it is gone, and whoever listens to it sees that
                peer.sendall(f"{line}\n".encode())

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for number, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, number)
            said = dict.fromkeys(self._peers, b"")
            heard = deadline = None
            while True:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                for key, _ in selector.select(left):
                    if key.data is None:
                        return
                    try:
                        received = self._peers[key.data].recv(4096)
                    except OSError:
                        received = b""
                    *lines, said[key.data] = (said[key.data] + received).split(b"\n")
                    for line in lines:
                        self._hear(key.data, line.decode(errors="replace"))
                    if not received:
                        selector.unregister(key.fileobj)
                        if key.data not in self._done:
                            self._hear(key.data, f"lost {key.data} {_SILENT}")
                        with self._change:
                            self._gone.add(key.data)
                            self._change.notify_all()
                if self._failure is not None:
                    # Process 0 leaves after the others; where it is process 0 that has gone, there is no time left.
                    grace = 2 * self._grace if self._process == 0 else 0 if 0 in self._gone else self._grace
                    heard = heard or time.monotonic()
                    deadline = heard + grace
                    if time.monotonic() >= deadline:
                        self._end()

    def _hear(self, number: int, line: str) -> None:
        """What another process said; process 0 passes on that it failed."""
        with self._change:
            if line == "done":
                self._done.add(number)
            elif self._failure is None:
                what, process, why = line.split(" ", 2)
                self._code = LOST if what == "lost" else FAILED
                self._failure = f"process {process} failed: {why}"
                self._send(line, {n: peer for n, peer in self._peers.items() if self._process == 0 and n != number})
            self._change.notify_all()

    def _end(self) -> None:
        """End this process from outside of the thread that waits."""
        with self._change:
            if self._ended:
                return
            print(f"error: {self._failure}; process {self._process} cannot go on alone", file=sys.stderr, flush=True)
            os._exit(self._code)
