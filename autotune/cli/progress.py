"""Shows the tuning on stderr while it happens: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from flashmoe.autotune.report.texts import outcome
from flashmoe.autotune.schedule.result import Result, Watch
from flashmoe.autotune.search.trials import Trial, best_so_far
from flashmoe.spec.problem import Problem


def counts(trials: Sequence[Trial]) -> str:
    """How many were pruned and how many did not work, where any did."""
    pruned = sum(trial.pruned for trial in trials)
    failed = sum(trial.status != "ok" for trial in trials)
    parts = [f"{n} {what}" for n, what in ((pruned, "pruned"), (failed, "failed")) if n]
    return ", ".join(parts)


def _note(trials: Sequence[Trial]) -> str:
    return ", ".join(filter(None, (counts(trials), best_so_far(trials))))


@contextlib.contextmanager
def shown(console: Console) -> Iterator[Watch]:
    """The Watch that suits `console`."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        _LeftColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
    )
    with progress:
        yield _Live(progress)


class _Lines(Watch):
    def __init__(self, console: Console) -> None:
        self._console = console

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def problem(self, problem: Problem, number: int, total: int) -> None:
        self._print(f"[{number}/{total}] {problem.label}")

    def stage(self, text: str) -> None:
        self._print(f"  {text}")

    def trials(self, trials: Sequence[Trial], total: int) -> None:
        note = _note(trials)
        self._print(f"  {len(trials)}/{total} tiles" + (f", {note}" if note else ""))

    def result(self, result: Result) -> None:
        self._print(f"  {outcome(result)} ({result.elapsed:.1f} s)")


class _LeftColumn(ProgressColumn):
    """What is left of the budget, kept in the task's field `deadline`."""

    def render(self, task: Task) -> Text:
        left = max(task.fields["deadline"] - time.monotonic(), 0.0)
        return Text(f"{left:.0f} s left")


class _Live(Watch):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._name = ""
        self._deadline = 0.0
        self._task = progress.add_task("starting", total=None, note="", deadline=0.0)

    def begin(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds

    def problem(self, problem: Problem, number: int, total: int) -> None:
        self._name = f"[{number}/{total}] {problem.label}"
        # A reset forgets all fields.
        self._progress.reset(self._task, total=None, note="", deadline=self._deadline)

    def stage(self, text: str) -> None:
        self._progress.update(self._task, description=escape(f"{self._name}: {text}"))

    def trials(self, trials: Sequence[Trial], total: int) -> None:
        self._progress.update(
            self._task, completed=len(trials), total=total, note=escape(_note(trials))
        )

    def result(self, result: Result) -> None:
        line = f"{self._name}: {outcome(result)} ({result.elapsed:.1f} s)"
        self._progress.console.print(line, markup=False, highlight=False)
