"""A process of our own that does as it is asked, and may die or hang doing so.

The parent holds a Child; the child runs `python -m flashmoe.autotune.running.process` and answers
requests one by one over a socket. What it is just doing stands in memory that both share, so that a
silent death can be blamed on the right candidate, and a hang told from slow work.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from flashmoe.measure.processes import signal_name
from flashmoe.measure.timing import DeviceLost

# Starting a process with torch, and computing a reference, may take so long on a slow machine.
START_PATIENCE = 300.0
# Between looks whether the child still makes progress, in seconds.
_LOOK_SECONDS = 0.25
# What a process that closed its connection may take to end.
_DEATH_SECONDS = 5.0
_PROGRESS = ctypes.c_int64 * 2
_PR_SET_PDEATHSIG = 1


class ChildFailed(RuntimeError):
    """The child did not answer: it `failed` or there was a `timeout` (the status). `step` is the
    number of the step it was at, as told by Steps."""

    def __init__(self, status: str, reason: str, step: int) -> None:
        super().__init__(reason)
        self.status = status
        self.step = step


class Steps:
    """What a child calls before each step: a number, read by the parent when the child is gone."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._cells = _PROGRESS.from_buffer(memory)

    def __call__(self, step: int) -> None:
        self._cells[1] = step
        self._cells[0] += 1

    def read(self) -> tuple[int, int]:
        """(how many steps were begun, the last one's number)."""
        return self._cells[0], self._cells[1]

    def close(self) -> None:
        del self._cells
        self._memory.close()


class Child:
    """One process. `target` is `module:callable`: called there with the Steps and `arguments`, it
    returns the object whose methods are requested. `nice` is added to its niceness."""

    def __init__(self, target: str, arguments: Sequence[Any] = (), nice: int = 0) -> None:
        ours, theirs = socket.socketpair()
        with tempfile.TemporaryFile() as shared, theirs:
            shared.truncate(ctypes.sizeof(_PROGRESS))
            self._steps = Steps(mmap.mmap(shared.fileno(), 0))
            fds = (theirs.fileno(), shared.fileno())
            self._process = subprocess.Popen(
                [sys.executable, "-m", "flashmoe.autotune.running.process", *map(str, fds)],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_fd(sys.stderr) else subprocess.DEVNULL,
            )
        self._connection = Connection(ours.detach())
        self._connection.send((os.getpid(), sys.path, nice, target, tuple(arguments)))
        self._open = True
        # Whether it is known that the target exists.
        self.up = False

    def request(self, method: str, *arguments: Any, patience: float, **options: Any) -> Any:
        """Call a method there and return what it returns, or raise what it raises.

        ChildFailed when the child dies, loses its device, or begins no step for `patience`
        seconds; it is dead then.
        """
        self.send(method, *arguments, **options)
        return self.receive(patience)

    def send(self, method: str, *arguments: Any, **options: Any) -> None:
        """Request without waiting: every request is answered, in their order."""
        # A child that is gone is found out by receive().
        with contextlib.suppress(OSError):
            self._connection.send((method, arguments, options))

    def receive(self, patience: float) -> Any:
        """The next answer, as request() returns it."""
        self.wait_until_up(patience)  # the making of the target answers first
        try:
            self._await(patience)
            status, answer = self._connection.recv()
        except (EOFError, OSError):
            raise ChildFailed("failed", self._death(), self._end()) from None
        if status == "ok":
            return answer
        if status == "raised":
            raise answer
        raise ChildFailed("failed", answer, self._end())

    def answers_within(self, seconds: float) -> bool:
        """Whether there is something to receive by then, if only that the child is gone."""
        return not self._open or self._connection.poll(max(seconds, 0.0))

    def wait_until_up(self, patience: float) -> None:
        """Until the target exists. Raises what its making raised, and ChildFailed."""
        if not self.up:
            self.up = True
            self.receive(patience)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._open:
            self._open = False
            self._process.kill()
            self._process.wait()
            self._connection.close()
            self._steps.close()

    def _await(self, patience: float) -> None:
        seen, since = self._steps.read()[0], time.monotonic()
        while not self._connection.poll(_LOOK_SECONDS):
            count = self._steps.read()[0]
            now = time.monotonic()
            if count != seen:
                seen, since = count, now
            elif now - since > patience:
                reason = f"no answer for {patience:.0f} s"
                raise ChildFailed("timeout", reason, self._end())

    def _end(self) -> int:
        step = self._steps.read()[1]
        self.close()
        return step

    def _death(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_DEATH_SECONDS)
        code = self._process.returncode
        if code is None:
            return "the process closed its connection"
        if code >= 0:
            return f"the process exited with code {code}"
        return f"the process died of {signal_name(-code)}"


def _has_fd(stream: Any) -> bool:
    try:
        return int(stream.fileno()) >= 0
    except (AttributeError, OSError, ValueError):
        return False


def _main(connection_fd: int, shared_fd: int) -> None:
    connection = Connection(connection_fd)
    try:
        parent, path, nice, target, arguments = connection.recv()
    except EOFError:
        return  # interrupted when it had only just started this process
    _die_with(parent)
    # The terminal's Ctrl-C is the parent's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[:] = path
    if nice:
        os.nice(nice)  # before the imports, which take seconds
    steps = Steps(mmap.mmap(shared_fd, 0))
    module, _, name = target.partition(":")
    make: Callable[..., object] = getattr(importlib.import_module(module), name)
    try:
        made = make(steps, *arguments)
    except Exception as error:  # noqa: BLE001 - the parent decides
        connection.send(("raised", _portable(error)))
        return
    connection.send(("ok", None))
    with contextlib.suppress(EOFError):
        while True:
            connection.send(_answer(made, *connection.recv()))


def _answer(
    made: object, method: str, arguments: Sequence[Any], options: dict[str, Any]
) -> tuple[str, Any]:
    try:
        return "ok", getattr(made, method)(*arguments, **options)
    except DeviceLost as error:
        return "lost", str(error)
    except Exception as error:  # noqa: BLE001 - the parent decides
        return "raised", _portable(error)


def _portable(error: Exception) -> Exception:
    """The error if it can be sent, else its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever cannot be pickled
        return RuntimeError("".join(traceback.format_exception_only(error)).strip())
    return error


def _die_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends, even in the middle of a hang."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]))
