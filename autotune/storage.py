"""Where studies live: Optuna's journal file beside the tuned database, or any Optuna storage."""

from __future__ import annotations

import random
import time
import warnings
from pathlib import Path

import filelock
import optuna
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock

from flashmoe import cache, database

_FORMS = "a path of a journal file, a database URL (DIALECT://...), or grpc://HOST:PORT"
# Workers that start together may create the tables together; all but one then fail.
_ATTEMPTS = 5


class StorageError(ValueError):
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


class _Lock(BaseJournalFileLock):
    """A lock that the operating system releases when its holder dies; Optuna's own would keep the
    next process waiting for 30 s. A record that a dying process left half written is cut off, which
    Optuna would otherwise join with the next one."""

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
        return _open_journal(path)
    except OSError as error:
        raise StorageError(f"--storage must be {_FORMS}, got {str(path)!r}: {error}") from None
    except (ValueError, KeyError, TypeError, AssertionError, AttributeError) as error:
        aside = cache.set_aside(path)
        warnings.warn(
            f"{path} is damaged ({error!r}); it was set aside as {aside.name}",
            database.DamagedDatabase,
            stacklevel=3,
        )
        return _open_journal(path)


def _open_journal(path: Path) -> BaseStorage:
    return JournalStorage(JournalFileBackend(str(path), lock_obj=_Lock(path)))


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

    for attempt in range(_ATTEMPTS):
        try:
            return RDBStorage(text, engine_kwargs={"pool_pre_ping": True})
        except ImportError as error:
            raise StorageError(f"--storage {shown(text)} needs its driver: {error}") from None
        except sqlalchemy.exc.ArgumentError:
            raise StorageError(f"--storage must be {_FORMS}, got {shown(text)!r}") from None
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            reason = str(error).splitlines()[0]
            if attempt + 1 == _ATTEMPTS:
                raise StorageError(f"--storage {shown(text)} cannot be used: {reason}") from error
        time.sleep(random.uniform(0.1, 0.3) * (attempt + 1))
    raise AssertionError("unreachable: the last attempt returns or raises")
