"""Studies on servers: PostgreSQL, MySQL and a gRPC proxy, shared by many processes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
from autotune_simulated import GRID, SimulatedBench, bowl
from autotune_workers import BEST, SPACE, WIDE, Turns, finished, in_process, run
from support import missing

from flashmoe.autotune.search.record import Record
from flashmoe.autotune.search.storage import StorageError, open_storage, open_study

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and killed")

_GRPC_SERVER = """
import sys
from optuna.storages import run_grpc_proxy_server
from flashmoe.autotune.search.storage import open_storage
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
    with _folder("postgres") as (folder, become):
        data, log = folder / "data", folder / "log"
        control = [*become, str(programs / "pg_ctl"), "-D", str(data)]
        _do([*become, str(programs / "initdb"), "-D", str(data), "-U", "tuner", "--auth=trust"])
        listen = f"-k {folder} -c listen_addresses= -c fsync=off"
        _do([*control, "-l", str(log), "-o", listen, "-w", "start"])
        yield f"postgresql+psycopg://tuner@/postgres?host={folder}"
        _do([*control, "-m", "immediate", "stop"])


@pytest.fixture(scope="module")
def mysql() -> Iterator[str]:
    """The same for MariaDB, which speaks MySQL's protocol."""
    if importlib.util.find_spec("pymysql") is None:
        missing("pymysql is not installed")
    # Its folder is not everybody's to search.
    program = shutil.which("mariadbd", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin"]))
    if program is None or shutil.which("mariadb-install-db") is None:
        missing("no MariaDB server (apt-get install mariadb-server)")
    with _folder("mysql") as (folder, become):
        options = ["--no-defaults", f"--datadir={folder / 'data'}"]
        _do(
            [
                *(*become, "mariadb-install-db", *options),
                *("--auth-root-authentication-method=normal", "--skip-test-db"),
            ]
        )
        socket_path, log = folder / "socket", folder / "log"
        server = subprocess.Popen(
            [
                *(*become, program, *options, f"--socket={socket_path}", "--skip-networking"),
                *(f"--pid-file={folder / 'pid'}", "--innodb-flush-log-at-trx-commit=0"),
                f"--log-error={log}",
            ],
            cwd="/",
        )
        shell = ["mariadb", "--no-defaults", f"--socket={socket_path}", "--user=root"]
        create = [*shell, "-e", "create database tuner"]
        for _ in range(300):
            if subprocess.run(create, capture_output=True).returncode == 0:
                break
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        yield f"mysql+pymysql://root@localhost/tuner?unix_socket={socket_path}"
        _do([*shell, "-e", "shutdown"])
        server.wait(timeout=60)


@contextlib.contextmanager
def _folder(user: str) -> Iterator[tuple[Path, list[str]]]:
    """A new folder, and what to put before a command that runs in it: servers refuse to be root."""
    become = []
    if os.getuid() == 0:
        if shutil.which("runuser") is None:
            missing("a server does not run as root, and there is no runuser")
        become = ["runuser", "-u", user, "--"]
    # Not below pytest's own folder, which only its user may enter.
    with tempfile.TemporaryDirectory(prefix="flashmoe-") as folder:
        if become:
            shutil.chown(folder, user)
        yield Path(folder), become


def _do(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr


def _clean(url: str) -> None:
    import sqlalchemy

    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("drop schema public cascade"))
        connection.execute(sqlalchemy.text("create schema public"))
    engine.dispose()


def _workers(url: str, count: int, seed: int) -> list[float]:
    """When each of `count` workers was done with one study, in simulated seconds."""
    _clean(url)
    open_study(open_storage(url), "study", {})
    turns = Turns(count)
    pids = [in_process(url, 0.0, seed + n, WIDE, turns, worker=n) for n in range(count)]
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    assert codes == [0] * count
    return list(turns.clocks)


def assert_every_tile_tried_once(url: str) -> None:
    found = Counter(finished(url, WIDE))
    assert set(found) == set(WIDE.tiles)
    assert max(found.values()) == 1


def test_three_workers_share_a_study_in_postgresql(postgres: str) -> None:
    # The slowest worker decides when all are done; which one's last tile is slow is chance.
    speedups = []
    for seed in range(0, 15, 3):
        (alone,) = _workers(postgres, 1, seed)
        speedups.append(alone / max(_workers(postgres, 3, seed)))
        assert_every_tile_tried_once(postgres)
    assert median(speedups) >= 2.5


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
    # The others tried what it had in hand.
    assert set(finished(postgres)) == set(GRID)
    # The same true times as the workers': samples of both are joined.
    again = run(postgres, SimulatedBench(bowl(BEST, step=0.05)))
    assert {trial.tile for trial in again.trials} == set(GRID)
    assert max(Counter(finished(postgres)).values()) == 1
    assert again.contenders[0].tile == BEST


def test_three_workers_share_a_study_in_mysql(mysql: str) -> None:
    open_study(open_storage(mysql), "study", {})
    pids = [in_process(mysql, 0.01, number, WIDE) for number in range(3)]
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    assert codes == [0, 0, 0]
    assert_every_tile_tried_once(mysql)
    again = run(mysql, SimulatedBench(bowl(BEST, step=0.05)), space=WIDE)
    assert again.tried == 0
    assert again.contenders[0].tile == BEST
