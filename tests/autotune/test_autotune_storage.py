"""Nothing is ever lost: studies that outlive their process, and many processes in one study."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import resource
import signal
import sqlite3
import sys
import time
from pathlib import Path

import optuna
import pytest
from autotune_simulated import DEFAULT, GRID, SimulatedBench, bowl
from autotune_workers import BEST, SPACE, finished, in_process, run
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.trial import TrialState

from flashmoe.autotune.search import identity
from flashmoe.autotune.search.record import LOST, Outcome, Record
from flashmoe.autotune.search.storage import (
    StorageError,
    failure,
    open_storage,
    open_study,
    shown,
    study_name,
)
from flashmoe.planning import database
from flashmoe.tiles import Tile

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and killed")


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


@pytest.mark.parametrize("record", ["not json\n", '{"op_code": 99}\n', "[]\n", "\n"])
@pytest.mark.parametrize("last", [True, False])
def test_records_before_the_damage_are_kept(tmp_path: Path, record: str, last: bool) -> None:
    path = tmp_path / "x.journal"
    run(str(path), SimulatedBench(bowl(BEST)), trials=3)
    before, size = finished(str(path)), path.stat().st_size
    text = path.read_text() + record + ("" if last else '{"op_code": 0}\n')
    path.write_text(text)
    with pytest.warns(database.DamagedDatabase, match=f"{path} is damaged from record") as told:
        open_storage(str(path))
    (aside,) = tmp_path.glob("x.journal.damaged-*")
    assert aside.name in str(told[0].message)
    assert aside.read_text() == text
    assert path.stat().st_size == size
    run(str(path), SimulatedBench(bowl(BEST)), trials=4)
    assert finished(str(path))[:3] == before
    assert len(finished(str(path))) == 4
    assert not list(tmp_path.glob(".*"))


def test_damage_that_appears_in_mid_run_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.journal"
    study = open_study(open_storage(str(path)), "study", {})
    with path.open("a") as file:
        file.write("not json\n")
    with pytest.raises(StorageError, match=f"{path} is damaged .* the next run sets that aside"):
        study.ask()


def test_a_full_disk_is_named_and_loses_no_finished_trial(tmp_path: Path) -> None:
    path = tmp_path / "x.journal"
    run(str(path), SimulatedBench(bowl(BEST)), trials=3)
    before, told = finished(str(path)), tmp_path / "told"
    pid = os.fork()
    if pid == 0:
        limit = path.stat().st_size + 5000
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            run(str(path), SimulatedBench(bowl(BEST)))
        except StorageError as error:
            told.write_text(str(error))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert told.read_text() == f"{path} cannot be written: File too large"
    now = finished(str(path))
    assert now[:3] == before
    assert {file.name for file in tmp_path.iterdir()} == {"x.journal", "x.journal.lock", "told"}
    again = run(str(path), SimulatedBench(bowl(BEST)))
    assert {trial.tile for trial in again.trials} == set(GRID)
    assert finished(str(path))[: len(now)] == now


def test_what_a_dead_process_had_told_is_its_trials_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = str(tmp_path / "x.journal")
    samples = (1.5, 1.6, 1.4)
    outcomes = [
        Outcome(GRID[0], "ok", "", samples, samples, 1.0),
        Outcome(GRID[1], "ok", "", samples, samples, 1.25, pruned=True),
        Outcome(GRID[2], "wrong", "off by 1"),
    ]
    record = Record(open_study(open_storage(where), "study", {}), SPACE)
    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(Record, "_conclude", lambda *_: None)
        mine = Record(open_study(open_storage(where), "study", {}), SPACE)
        mine.use("brute", [outcome.tile for outcome in outcomes], 0)
        for outcome in outcomes:
            asked = mine.ask()
            assert asked is not None
            mine.tell(asked[1], outcome)
        os._exit(0)
    os.waitpid(pid, 0)
    assert not record.outcomes()
    assert record.fail_dead() == 3
    assert record.outcomes() == outcomes
    states = [trial.state for trial in record.study.trials]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]


def test_a_decision_is_not_lost_for_a_note_about_it(tmp_path: Path) -> None:
    path = tmp_path / "x.journal"
    record = Record(open_study(open_storage(str(path)), "study", {}), SPACE)
    path.unlink()
    for note in (lambda: record.finish({}), lambda: record.reject(BEST, "wrong", "off by 1")):
        with pytest.warns(UserWarning, match=f"{path} cannot be written: No such file"):
            note()


def test_a_locked_sqlite_file_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = f"sqlite:///{tmp_path / 'x.sqlite'}"
    patient = open_storage(where)
    assert isinstance(patient, RDBStorage)
    with patient.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 60_000  # in ms
    monkeypatch.setattr("flashmoe.autotune.search.storage._LOCKED_SECONDS", 0.01)
    study = open_study(open_storage(where), "study", {})
    with contextlib.closing(sqlite3.connect(tmp_path / "x.sqlite")) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(optuna.exceptions.StorageInternalError) as caught:
            study.ask()
        assert failure(caught.value) == "the storage of the trials failed: database is locked"
        with pytest.raises(StorageError, match=f"--storage {where} cannot be used: .*is locked"):
            open_storage(where)
        other.rollback()
    assert study.ask().number == 0


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
