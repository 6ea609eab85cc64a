"""Which process a trial belongs to, and whether that process still lives."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
from pathlib import Path

# A process of another host is believed dead when it told nothing for so long, in seconds. Hosts
# that share a study must agree on the time to a fraction of this.
REMOTE_SILENCE = 600.0


def worker_name() -> str:
    """HOST/PID/START of this process. HOST tells machines, boots and containers apart, START a
    process from a later one with the same PID."""
    pid = os.getpid()
    return f"{_host()}/{pid}/{_start(pid)}"


def is_dead(worker: str, last_heard: float) -> bool:
    """Whether the process `worker` has ended; `last_heard` is when it last told anything, in
    seconds since the epoch. An unfinished trial without a worker belongs to nobody."""
    host, _, rest = worker.partition("/")
    pid, _, start = rest.partition("/")
    if host != _host() or not pid.isdigit() or os.name != "posix":
        return time.time() - last_heard > REMOTE_SILENCE
    if not _exists(int(pid)):
        return True
    return _start(int(pid)) != start


@functools.cache
def _host() -> str:
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        parts.append(boot.strip()[:8])
    with contextlib.suppress(OSError):
        parts.append("".join(filter(str.isdigit, os.readlink("/proc/self/ns/pid"))))
    return "+".join(parts)


def _exists(pid: int) -> bool:
    try:
        with contextlib.suppress(PermissionError):  # there, and another user's
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _start(pid: int) -> str:
    """When a process started, in clock ticks since boot; empty where the system does not tell, and
    for one that is dead and only not yet reaped."""
    try:
        # The name in parentheses may hold spaces.
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = text.rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
