"""Where studies live: Optuna's journal file beside the tuned database, or any Optuna storage; and
how one problem's study is found again there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import time
import warnings
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import optuna
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock, get_lock_file
from optuna.storages.journal._storage import JournalStorageReplayResult

from flashmoe.machine import cache
from flashmoe.planning import database

# A study's attribute: set once its winner was decided and stored.
FINISHED = "finished"
_FORMS = "a path of a journal file, a database URL (DIALECT://...), or grpc://HOST:PORT"
# Workers that start together may create the tables together; all but one then fail.
_ATTEMPTS = 5
# How long a worker waits for others that write to an SQLite file: a backup takes that long, too.
_LOCKED_SECONDS = 60.0


class StorageError(Exception):
    """A storage that cannot be used; the message names it, without its password, and says why."""


def journal_path(device_name: str) -> Path:
    """The default storage of a device model's studies."""
    return database.user_path(device_name).with_suffix(".journal")


def open_storage(text: str) -> BaseStorage:
    """The storage that `text` names: a journal file's path, `sqlite:///...`, `postgresql://...`,
    `mysql://...` or `grpc://HOST:PORT`.

    A journal that cannot be understood is set aside and named in a DamagedDatabase warning. Raises
    StorageError for a storage that cannot be reached.
    """
    if "://" not in text:
        return _journal(Path(text.removeprefix("journal:")).expanduser())
    if text.startswith("grpc://"):
        return _grpc(text)
    return _database(text)


def shown(text: str) -> str:
    """A storage's name without its password."""
    if "://" not in text:
        return text
    scheme, _, rest = text.partition("://")
    account, at, place = rest.rpartition("@")
    user = account.partition(":")[0]
    hidden = f"{user}:***" if ":" in account else account
    return f"{scheme}://{hidden}{at}{place}"


def failure(error: Exception) -> str:
    """Why a database failed, in one line; empty for any other error."""
    told = _of_driver(error)
    return f"the storage of the trials failed: {told}" if told else ""


def _of_driver(error: Exception) -> str:
    """What the driver of a database said, where Optuna only guesses; empty without one."""
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
    return str(getattr(cause, "orig", "")).partition("\n")[0]


class _Journal(JournalFileBackend):
    """Optuna's journal, which names itself where it cannot be read or written."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), lock_obj=_Lock(path))
        self._path = path

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        with self._named("read"):
            yield from super().read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with self._named("written"):
            super().append_logs(logs)

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self._path} cannot be {what}: {error.strerror}") from error
        except ValueError as error:
            why = f"{self._path} is damaged ({error}); the next run sets that aside"
            raise StorageError(why) from error


class _Lock(BaseJournalFileLock):
    """A lock that the operating system releases when its holder dies; Optuna's own would keep the
    next process waiting for 30 s. A record that a dying process or a full disk left half written is
    cut off, which Optuna would otherwise join with the next one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = filelock.FileLock(f"{path}.lock")

    def acquire(self) -> bool:
        self._lock.acquire()
        try:
            _cut_partial_record(self._path)
        except BaseException:
            self._lock.release()
            raise
        return True

    def release(self) -> None:
        self._lock.release()


def _cut_partial_record(path: Path) -> None:
    with path.open("rb+") as file:
        end = file.seek(0, 2)
        if end == 0:
            return
        file.seek(end - 1)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _journal(path: Path) -> BaseStorage:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        journal = _Journal(path)
        # Whatever will write must be able to, and nobody writes meanwhile.
        with get_lock_file(_Lock(path)):
            _set_damage_aside(path)
        return JournalStorage(journal)
    except OSError as error:
        raise StorageError(
            f"--storage must be {_FORMS}, got {str(path)!r}: {error.strerror}"
        ) from None


def _set_damage_aside(path: Path) -> None:
    """Where a record cannot be understood, keep those before it: what follows may depend on it. The
    whole file is set aside."""
    content = path.read_bytes()
    known = JournalStorageReplayResult("")
    good = number = 0
    for line in content.splitlines(keepends=True):
        try:
            known.apply_logs([json.loads(line)])
        except (ValueError, KeyError, TypeError, AssertionError, AttributeError) as error:
            why = repr(error)
            break
        good, number = good + len(line), number + 1
    else:
        return
    kept = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        kept.write_bytes(content[:good])
        aside = cache.set_aside(path)
        kept.replace(path)
    finally:
        kept.unlink(missing_ok=True)
    warnings.warn(
        f"{path} is damaged from record {number + 1} on ({why}): it was set aside as "
        f"{aside.name}, and the {number} records before that are kept",
        database.DamagedDatabase,
        stacklevel=4,
    )


def _grpc(text: str) -> BaseStorage:
    host, _, port = text.removeprefix("grpc://").rstrip("/").partition(":")
    if not host or not port.isdigit():
        raise StorageError(f"--storage must be {_FORMS}, got {text!r}")
    try:
        proxy = GrpcStorageProxy(host=host, port=int(port))
        proxy.wait_server_ready(timeout=10)
    except ImportError:
        raise StorageError(f"--storage {text} needs grpcio: pip install grpcio protobuf") from None
    except Exception as error:
        raise StorageError(f"--storage {text} cannot be reached: {error}") from error
    return proxy


def _database(text: str) -> BaseStorage:
    import sqlalchemy

    options: dict[str, Any] = {"pool_pre_ping": True}
    if text.startswith("sqlite"):
        options["connect_args"] = {"timeout": _LOCKED_SECONDS}
    for attempt in range(_ATTEMPTS):
        try:
            return RDBStorage(text, engine_kwargs=options)
        except ImportError as error:
            raise StorageError(f"--storage {shown(text)} needs its driver: {error}") from None
        except sqlalchemy.exc.ArgumentError:
            raise StorageError(f"--storage must be {_FORMS}, got {shown(text)!r}") from None
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            reason = _of_driver(error) or str(error).splitlines()[0]
            if attempt + 1 == _ATTEMPTS:
                raise StorageError(f"--storage {shown(text)} cannot be used: {reason}") from error
        time.sleep(random.uniform(0.1, 0.3) * (attempt + 1))
    raise AssertionError("unreachable: the last attempt returns or raises")


def open_study(
    storage: BaseStorage, name: str, facts: Mapping[str, Any], *, fresh: float | None = None
) -> optuna.Study:
    """The study `name`, made if need be with `facts` as its attributes.

    `fresh` wants none that was finished before that time, in seconds since the epoch: then the next
    generation `name#2`, `name#3`... is used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    generation = 1
    while True:
        full = name if generation == 1 else f"{name}#{generation}"
        study = optuna.create_study(
            storage=storage,
            study_name=full,
            sampler=RandomSampler(),
            direction="minimize",
            load_if_exists=True,
        )
        finished = float(study.user_attrs.get(FINISHED, {}).get("at", math.inf))
        stale = fresh is not None and finished < fresh
        if not stale and not (finished < math.inf and _exists(storage, name, generation)):
            break
        generation += 1
    known = study.user_attrs
    for key, value in facts.items():
        if key not in known:
            study.set_user_attr(key, value)
    return study


def _exists(storage: BaseStorage, name: str, generation: int) -> bool:
    """Whether there is a generation after this one."""
    try:
        storage.get_study_id_from_name(f"{name}#{generation + 1}")
    except KeyError:
        return False
    return True


def study_name(prefix: str, problem: str, facts: Mapping[str, Any]) -> str:
    """A study's name: prefix, problem, and a digest of what its times depend on."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return f"{prefix}/{problem}/{digest}"
