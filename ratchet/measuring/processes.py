"""Fresh processes that measure: started, told what to do, listened to, and survived."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashmoe.measure.processes import signal_name
from flashmoe.ratchet.errors import UserError

Answer = dict[str, Any]
WORKER = (sys.executable, "-m", "flashmoe.ratchet.measuring.worker")
# Seconds after which a worker that says nothing hangs: the slowest case takes a few.
_SILENCE = 300.0


@dataclass(frozen=True, slots=True)
class Source:
    """Something to measure: the command that starts its worker, the folder it starts in, variables
    of its environment, what its jobs have besides (see worker.run), and its commit."""

    name: str
    command: tuple[str, ...] = WORKER
    folder: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    job: Mapping[str, Any] = field(default_factory=dict)
    commit: str = ""


class Process:
    """A worker that has started; it imports, then waits to be told what to measure."""

    def __init__(self, source: Source, debug: bool = False) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        self._process = subprocess.Popen(
            source.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if debug else self._log,
            encoding="utf-8",
            errors="replace",
            cwd=source.folder,
            env={**os.environ, **source.environment},
        )
        self.silent = False

    def answers(self, job: Mapping[str, Any]) -> Iterator[Answer]:
        """What it says, one answer a line, until it ends or says nothing for too long."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            with self._process.stdin as told:
                told.write(json.dumps(job))
        except BrokenPipeError:
            return  # it ended before it could be told anything; `end` says how
        while True:
            with self._patience():
                line = self._process.stdout.readline()
            # One that dies while it writes leaves a part of a line.
            if not line.endswith("\n"):
                return
            yield json.loads(line)

    def end(self) -> str:
        """Ends it, if it has not ended by itself, and tells how; empty when all was well."""
        assert self._process.stdout is not None
        self._process.stdout.close()
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        self._log.close()
        if code == 0:
            return ""
        if self.silent:
            how = f"said nothing for {_SILENCE:.0f} seconds"
        elif code < 0:
            how = f"was killed by {signal_name(-code)}"
        else:
            how = f"ended with exit code {code}"
        return how + (f": {lines[-1].strip()}" if lines else "")

    def kill(self) -> None:
        """Without waiting for what it does."""
        self._process.kill()
        self.end()

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        """Ends a worker that says nothing for too long."""
        timer = threading.Timer(_SILENCE, self._give_up)
        # An interrupt may leave it running, which must not keep this process from ending.
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _give_up(self) -> None:
        self.silent = True
        self._process.kill()


def answers(
    first: Process, source: Source, job: Mapping[str, Any], debug: bool
) -> Iterator[Answer]:
    """All answers to one job, from `first`; where a worker dies within a case, that case is
    `failed` (`timeout`, if it hung) and another worker does the rest. One that dies after its last
    case has lost nothing, which is noted on stderr. Raises UserError when a worker cannot measure
    anything."""
    left, process = list(job["cases"]), first
    while left:
        current: str | None = None
        ended = False
        try:
            for said in process.answers({**job, "cases": left}):
                if said["event"] == "error":
                    raise UserError(f"a worker could not measure: {said['reason']}")
                current = said["case"] if said["event"] in ("begin", "again") else None
                if said["event"] == "case":
                    left.remove(said["case"])
                yield said
            ended = True
        finally:
            if not ended:
                process.kill()
        how = process.end()
        if not left:
            if how:
                print(f"note: a worker {how}, after it had measured everything", file=sys.stderr)
            return
        if current is None:
            raise UserError(f"a worker {how or 'ended before it had measured everything'}")
        left.remove(current)
        status = "timeout" if process.silent else "failed"
        reason = f"the process {how or 'ended within the case'}"
        # In our code or in SDPA; ours is the one under test.
        yield {"event": "case", "case": current, **answer(status, reason=reason)}
        if left:
            process = Process(source, debug)


def answer(
    ours_status: str = "ok",
    sdpa_status: str = "ok",
    reason: str = "",
    plans: Sequence[Mapping[str, str]] = (),
    error: float | None = None,
) -> Answer:
    """What becomes of a case, without samples."""
    data: Answer = {
        side: {"status": status, "reason": reason if status != "ok" else "", "samples": []}
        for side, status in (("ours", ours_status), ("sdpa", sdpa_status))
    }
    data |= {"plans": list(plans), "error": error, "sdpa_backend": "", "disturbed": 0.0}
    return {**data, "telemetry": None}
