"""Nothing is ever lost: studies that outlive their process, and many processes in one study."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from autotune_simulated import DEFAULT, GRID, SimulatedBench, bowl
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from support import missing

from flashmoe import database
from flashmoe.autotune import identity
from flashmoe.autotune.candidate import Candidate
from flashmoe.autotune.record import LOST, Outcome, Record, open_study, study_name
from flashmoe.autotune.search import search
from flashmoe.autotune.space import Space
from flashmoe.autotune.storage import StorageError, open_storage, shown
from flashmoe.autotune.trials import Search
from flashmoe.tiles import Tile

BEST = Tile("cpu", 192, 256)
SPACE = Space(GRID)
# Enough for three workers to share.
WIDE = Space([*GRID, *(Tile("cpu", 1024 + t.block_m, t.block_n) for t in GRID)])
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and killed")


class SlowBench(SimulatedBench):
    """Takes real time: `cost` seconds for every candidate in a look."""

    def __init__(self, cost: float, seed: int = 0) -> None:
        super().__init__(bowl(BEST, step=0.05), seed=seed)
        self.cost = cost

    def measure(self, candidates, **options):  # type: ignore[no-untyped-def]
        time.sleep(self.cost * len(candidates))
        return super().measure(candidates, **options)

    def now(self) -> float:
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)


class Turns:
    """One simulated clock a worker. A worker goes on when no other is behind it, so that what each
    finds in the study, and when all are done, depends on simulated time alone."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("fork")
        self._changed = context.Condition()
        self.clocks = context.Array("d", count, lock=False)
        self._done = context.Array("b", count, lock=False)

    def advance(self, worker: int, clock: float) -> None:
        with self._changed:
            self.clocks[worker] = clock
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._next() == worker, timeout=120)

    def finish(self, worker: int) -> None:
        with self._changed:
            self._done[worker] = True
            self._changed.notify_all()

    def _next(self) -> int:
        """The worker that is furthest behind, of equals the first."""
        return min(
            (number for number, done in enumerate(self._done) if not done),
            key=lambda number: self.clocks[number],
        )


class TurnBench(SimulatedBench):
    """Takes simulated time only, turn by turn with the other workers."""

    def __init__(self, turns: Turns, worker: int) -> None:
        super().__init__(bowl(BEST, step=0.05), seed=worker, prepare_seconds=0.01)
        self._turns = turns
        self._worker = worker
        turns.advance(worker, 0.0)

    def prepare(self, candidate):  # type: ignore[no-untyped-def]
        measured = super().prepare(candidate)
        self._turns.advance(self._worker, self.clock)
        return measured

    def measure(self, candidates, **options):  # type: ignore[no-untyped-def]
        measured = super().measure(candidates, **options)
        self._turns.advance(self._worker, self.clock)
        return measured

    def wait(self, seconds: float) -> None:
        super().wait(seconds)
        self._turns.advance(self._worker, self.clock)


def run(
    where: str,
    bench: SimulatedBench,
    seed: int = 0,
    trials: int | None = None,
    contend: bool = True,
    space: Space = SPACE,
) -> Search:
    study = open_study(open_storage(where), "study", {})
    return search(
        space,
        bench,
        Candidate.of_tile(DEFAULT),
        [DEFAULT],
        Record(study, space),
        seconds=60,
        trials=trials,
        sampler="brute",
        seed=seed,
        contend=contend,
    )


def in_process(
    where: str,
    cost: float,
    seed: int,
    space: Space = SPACE,
    turns: Turns | None = None,
) -> int:
    """Search in a forked process, which has all modules already; returns its PID."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            bench = TurnBench(turns, seed) if turns else SlowBench(cost, seed)
            run(where, bench, seed, contend=False, space=space)
            code = 0
        except Exception:  # noqa: BLE001 - told by the exit code
            traceback.print_exc()
        finally:
            if turns:
                turns.finish(seed)
            os._exit(code)
    return pid


def finished(where: str, space: Space = SPACE) -> list[Tile]:
    study = open_study(open_storage(where), "study", {})
    return [outcome.tile for outcome in Record(study, space).outcomes()]


def test_the_same_command_again_measures_nothing_again(tmp_path: Path) -> None:
    where = str(tmp_path / "x.journal")
    first = run(where, SimulatedBench(bowl(BEST)), trials=12)
    bench = SimulatedBench(bowl(BEST))
    again = run(where, bench)
    assert [trial.tile for trial in again.trials[:12]] == [trial.tile for trial in first.trials]
    assert {trial.tile for trial in again.trials} == set(GRID)
    assert (first.tried, again.tried) == (12, len(GRID) - 12)
    # What was known is timed again only as one of the contenders.
    known = {str(trial.tile) for trial in first.trials} - {str(c) for c in again.contenders}
    assert not known & set(bench.timed) - {str(DEFAULT)}
    assert again.contenders[0].tile == BEST


_GRPC_SERVER = """
import sys
from optuna.storages import run_grpc_proxy_server
from flashmoe.autotune.storage import open_storage
run_grpc_proxy_server(open_storage(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]))
"""


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_grpc_proxy_is_a_storage_like_any_other(tmp_path: Path) -> None:
    pytest.importorskip("grpc")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    journal = str(tmp_path / "behind.journal")
    server = subprocess.Popen([sys.executable, "-c", _GRPC_SERVER, journal, str(port)])
    try:
        where = f"grpc://127.0.0.1:{port}"
        first = run(where, SimulatedBench(bowl(BEST)), trials=12)
        again = run(where, SimulatedBench(bowl(BEST)))
        assert (first.tried, again.tried) == (12, len(GRID) - 12)
    finally:
        server.kill()
        server.wait()
    assert set(finished(journal)) == set(GRID)
    with pytest.raises(StorageError, match=rf"grpc://127.0.0.1:{port} cannot be reached"):
        open_storage(where)


def test_kill_9_at_random_moments_loses_and_repeats_nothing(tmp_path: Path) -> None:
    where, rng = str(tmp_path / "x.journal"), random.Random(1)
    known: list[Tile] = []
    for kill in range(20):
        pid = in_process(where, 0.002, seed=kill)
        time.sleep(rng.uniform(0.0, 0.2))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        now = finished(where)
        assert now[: len(known)] == known
        known = now
    assert len(known) == len(set(known))
    pid = in_process(where, 0.0, seed=99)
    assert os.waitpid(pid, 0)[1] == 0
    assert sorted(map(str, finished(where))) == sorted(map(str, GRID))
    study = open_study(open_storage(where), "study", {})
    # One that died before it had named itself is failed later.
    assert not [t for t in study.trials if t.state == TrialState.RUNNING and t.user_attrs]


def _write_forever(path: Path) -> None:
    number = 0
    while True:
        entry = database.Entry(_problem(), "cpu", "", "", samples={"x": (1e-3,) * 2000})
        database.update(path, {f"bucket-{number % 50}": entry})
        number += 1


def _problem():  # type: ignore[no-untyped-def]
    from autotune_simulated import PROBLEM

    return PROBLEM


def test_kill_9_leaves_a_valid_database(tmp_path: Path) -> None:
    path, rng = tmp_path / "x.json", random.Random(2)
    context = multiprocessing.get_context("fork")
    sizes = []
    for _ in range(20):
        writer = context.Process(target=_write_forever, args=(path,))
        writer.start()
        time.sleep(rng.uniform(0.02, 0.08))
        writer.kill()
        writer.join()
        if path.exists():
            json.loads(path.read_text())
            sizes.append(len(database.load(path)))
    assert sizes == sorted(sizes)
    assert sizes[-1] > 0


def test_a_record_that_was_half_written_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "x.journal"
    run(str(path), SimulatedBench(bowl(BEST)), trials=3)
    before = path.read_text()
    path.write_text(before + '{"op_code":5,"trial_id"')
    run(str(path), SimulatedBench(bowl(BEST)), trials=4)
    assert path.read_text().startswith(before)
    assert len(finished(str(path))) == 4


def test_a_damaged_journal_is_set_aside_and_named(tmp_path: Path) -> None:
    path = tmp_path / "x.journal"
    path.write_text("no journal\nat all\n")
    with pytest.warns(database.DamagedDatabase, match=str(path)):
        open_storage(str(path))
    (aside,) = tmp_path.glob("x.journal.damaged-*")
    assert aside.read_text() == "no journal\nat all\n"


def test_trials_of_a_dead_process_are_failed_and_its_tiles_tried(tmp_path: Path) -> None:
    where = str(tmp_path / "x.journal")
    record = Record(open_study(open_storage(where), "study", {}), SPACE)
    pid = os.fork()
    if pid == 0:
        mine = Record(open_study(open_storage(where), "study", {}), SPACE)
        mine.use("brute", [], 0)
        mine.ask()
        os._exit(0)
    os.waitpid(pid, 0)
    assert not record.outcomes()
    assert record.running() == 1
    assert record.fail_dead() == 1
    assert not record.outcomes()
    assert record.running() == 0
    (trial,) = record.study.trials
    assert (trial.state, trial.user_attrs["outcome"]["status"]) == (TrialState.FAIL, LOST)
    assert {t.tile for t in run(where, SimulatedBench(bowl(BEST))).trials} == set(GRID)


def test_live_processes_are_not_taken_for_dead() -> None:
    mine = identity.worker_name()
    assert not identity.is_dead(mine, 0.0)
    host, pid, start = mine.split("/")
    assert identity.is_dead(f"{host}/{pid}/{int(start) + 1}", time.time())
    assert not identity.is_dead(f"elsewhere/{pid}/{start}", time.time())
    assert identity.is_dead(f"elsewhere/{pid}/{start}", time.time() - 2 * identity.REMOTE_SILENCE)


def test_failures_keep_their_reason() -> None:
    record = Record(open_study(InMemoryStorage(), "study", {}), SPACE)
    record.use("brute", [BEST], 0)
    asked = record.ask()
    assert asked is not None
    record.tell(asked[1], Outcome(BEST, "timeout", "no answer for 10 s"))
    (trial,) = record.study.trials
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs["outcome"]["status"] == "timeout"
    assert trial.user_attrs["outcome"]["reason"] == "no answer for 10 s"


def test_a_finished_study_is_used_until_a_fresh_one_is_wanted() -> None:
    storage = InMemoryStorage()

    def name(fresh: bool) -> str:
        return open_study(storage, "study", {}, fresh=time.time() if fresh else None).study_name

    assert name(True) == "study"
    Record(open_study(storage, "study", {}), SPACE).finish({})
    assert name(False) == "study"
    assert name(True) == "study#2"
    # An unfinished fresh study is gone on with, by whoever comes next.
    assert name(True) == name(False) == "study#2"
    # One that was finished since is fresh enough: a helper may come late.
    began = time.time()
    Record(open_study(storage, "study", {}), SPACE).finish({})
    assert open_study(storage, "study", {}, fresh=began).study_name == "study#2"


def test_names_depend_on_what_times_depend_on() -> None:
    one = study_name("flashmoe", "fwd b1", {"kernels": "1"})
    assert one == study_name("flashmoe", "fwd b1", {"kernels": "1"})
    assert one != study_name("flashmoe", "fwd b1", {"kernels": "2"})


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("nonsense://x", ["--storage", "nonsense"]),
        ("grpc://x", ["--storage", "grpc://HOST:PORT", "grpc://x"]),
        ("postgresql+psycopg://u:secret@127.0.0.1:1/x", ["--storage", "u:***@127.0.0.1"]),
    ],
)
def test_a_storage_that_cannot_be_used_is_named(text: str, parts: list[str]) -> None:
    with pytest.raises(StorageError) as caught:
        open_storage(text)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "secret" not in str(caught.value)


def test_passwords_are_not_shown() -> None:
    assert shown("postgresql://me:pw@host/db") == "postgresql://me:***@host/db"
    assert shown("/a/b.journal") == "/a/b.journal"


def test_who_asks_first_but_looks_late_yields(tmp_path: Path) -> None:
    where = str(tmp_path / "x.journal")
    early, late = (Record(open_study(open_storage(where), "study", {}), SPACE) for _ in range(2))
    for record in (early, late):
        record.use("brute", [BEST], 0)
    trial = early.study.ask()  # the lower number, and nothing else yet
    trial.set_user_attr("worker", {"name": "early", "asked": time.time()})
    asked = late.ask()
    assert asked is not None
    assert asked[0] == SPACE.suggest(trial) == BEST
    assert not early._has(trial, BEST)


def _postgres_bin() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a server of our own, from the distribution's package."""
    if importlib.util.find_spec("psycopg") is None:
        missing("psycopg is not installed")
    programs = _postgres_bin()
    if programs is None:
        missing("no PostgreSQL server (apt-get install postgresql)")
    become = []
    if os.getuid() == 0:
        if shutil.which("runuser") is None:
            missing("PostgreSQL does not run as root, and there is no runuser")
        become = ["runuser", "-u", "postgres", "--"]
    # Not below pytest's own folder, which only its user may enter.
    with tempfile.TemporaryDirectory(prefix="flashmoe-") as folder:
        if become:
            shutil.chown(folder, "postgres")
        yield from _server(programs, Path(folder), become)


def _server(programs: Path, folder: Path, become: list[str]) -> Iterator[str]:
    data, log = folder / "data", folder / "log"

    def do(*words: str) -> None:
        done = subprocess.run([*become, *words], capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stdout + done.stderr

    do(str(programs / "initdb"), "-D", str(data), "-U", "tuner", "--auth=trust", "-E", "UTF8")
    listen = f"-k {folder} -c listen_addresses= -c fsync=off"
    do(str(programs / "pg_ctl"), "-D", str(data), "-l", str(log), "-o", listen, "-w", "start")
    yield f"postgresql+psycopg://tuner@/postgres?host={folder}"
    do(str(programs / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop")


def _clean(url: str) -> None:
    import sqlalchemy

    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("drop schema public cascade"))
        connection.execute(sqlalchemy.text("create schema public"))
    engine.dispose()


def _workers(url: str, count: int) -> list[float]:
    """When each of `count` workers was done with one study, in simulated seconds."""
    _clean(url)
    open_study(open_storage(url), "study", {})
    turns = Turns(count)
    pids = [in_process(url, 0.0, number, WIDE, turns) for number in range(count)]
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    assert codes == [0] * count
    return list(turns.clocks)


def assert_every_tile_tried_once(url: str) -> None:
    found = Counter(finished(url, WIDE))
    assert set(found) == set(WIDE.tiles)
    assert max(found.values()) == 1


def test_three_workers_share_a_study_in_postgresql(postgres: str) -> None:
    (alone,) = _workers(postgres, 1)
    together = _workers(postgres, 3)
    # The slowest worker decides when all are done.
    assert alone / max(together) >= 2.5
    assert_every_tile_tried_once(postgres)


def test_workers_that_run_at_the_same_moment_try_no_tile_twice(postgres: str) -> None:
    _clean(postgres)
    open_study(open_storage(postgres), "study", {})
    pids = [in_process(postgres, 0.01, number, WIDE) for number in range(3)]
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    assert codes == [0, 0, 0]
    assert_every_tile_tried_once(postgres)


def test_a_worker_that_is_killed_costs_only_its_trials(postgres: str) -> None:
    _clean(postgres)
    open_study(open_storage(postgres), "study", {})
    pids = [in_process(postgres, 0.03, seed=number) for number in range(3)]
    record = Record(open_study(open_storage(postgres), "study", {}), SPACE)
    while len(record.outcomes()) < 6:
        time.sleep(0.02)
    os.kill(pids[0], signal.SIGKILL)
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    assert codes[1:] == [0, 0]
    # The same true times as the workers': samples of both are joined.
    again = run(postgres, SimulatedBench(bowl(BEST, step=0.05)))
    assert {trial.tile for trial in again.trials} == set(GRID)
    assert max(Counter(finished(postgres)).values()) == 1
    assert again.contenders[0].tile == BEST
