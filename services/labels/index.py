"""What lies in a label cache, in SQLite: for deciding what goes when room is needed, and for counting.

The files are the truth; reading labels never asks the index. A row is written before its file appears and deleted after
its file is gone, so that a process killed in between leaves a row without a file, which costs nothing, and never a file
that nobody counts. An index that is missing or damaged is made anew from the files.
"""

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from services.labels.entry import whole_blocks
from services.labels.shelf import Shelf

log = logging.getLogger(__name__)

_VERSION = 1
_BUSY_SECONDS = 30.0
_SCHEMA = (
    "CREATE TABLE entries (key TEXT PRIMARY KEY, bytes INTEGER NOT NULL, used INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE INDEX entries_by_use ON entries (used)",
    "CREATE TABLE counts (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID",
    "INSERT INTO counts VALUES ('entries', 0), ('bytes', 0)",
    """CREATE TRIGGER entered AFTER INSERT ON entries BEGIN
         UPDATE counts SET value = value + 1 WHERE name = 'entries';
         UPDATE counts SET value = value + new.bytes WHERE name = 'bytes';
       END""",
    """CREATE TRIGGER changed AFTER UPDATE OF bytes ON entries BEGIN
         UPDATE counts SET value = value + new.bytes - old.bytes WHERE name = 'bytes';
       END""",
    """CREATE TRIGGER left AFTER DELETE ON entries BEGIN
         UPDATE counts SET value = value - 1 WHERE name = 'entries';
         UPDATE counts SET value = value - old.bytes WHERE name = 'bytes';
       END""",
)

Result = TypeVar("Result")


class Index:
    """Safe between threads and processes. Methods raise sqlite3.Error where the disk lets the index do nothing."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._path = shelf.directory / "index.sqlite"
        self._lock = threading.Lock()
        self._db, self._inode = self._open()

    def reserve(self, key: str, size: int, *, max_bytes: int, spare_bytes: int) -> tuple[bool, int]:
        """Whether there is room for an entry, made by deleting those unused longest, and how many those were.

        ``spare_bytes``: what the file system has to spare; below 0 the cache gives that much back.
        """

        def work(db: sqlite3.Connection) -> tuple[bool, int]:
            held = _count(db, "bytes") - _size(db, key)
            excess = max(held + size - max_bytes, size - spare_bytes)
            evicted, freed = self._evict(db, excess, but=key) if excess > 0 else (0, 0)
            if freed < excess:
                return False, evicted
            row = (key, size, time.time_ns())
            db.execute(
                "INSERT INTO entries VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET bytes = excluded.bytes, "
                "used = excluded.used",
                row,
            )
            return True, evicted

        return self._write(work)

    def publish(self, key: str, appear: Callable[[], None]) -> None:
        """Let the reserved entry's file ``appear``, unless it has had to go already."""

        def work(db: sqlite3.Connection) -> None:
            if _size(db, key):
                appear()

        self._write(work)

    def drop(self, key: str) -> None:
        """Delete an entry's file and row."""

        def work(db: sqlite3.Connection) -> None:
            self._shelf.remove(key)
            db.execute("DELETE FROM entries WHERE key = ?", (key,))

        self._write(work)

    def free(self, size: int) -> int:
        """Delete entries unused longest, of ``size`` bytes together; returns how many."""
        return self._write(lambda db: self._evict(db, size, but="")[0])

    def clear(self) -> None:
        """Delete every entry."""

        def work(db: sqlite3.Connection) -> None:
            for file in self._shelf.entries():
                self._shelf.remove(file.name)
            db.execute("DELETE FROM entries")

        self._write(work)

    def record(self, used: Mapping[str, int], counts: Mapping[str, int]) -> None:
        """Note when entries were last used, and add to the counts of all processes."""

        def work(db: sqlite3.Connection) -> None:
            db.executemany(
                "UPDATE entries SET used = ? WHERE key = ? AND used < ?",
                [(moment, key, moment) for key, moment in used.items()],
            )
            db.executemany(
                "INSERT INTO counts VALUES (?, ?) ON CONFLICT DO UPDATE SET value = value + excluded.value",
                counts.items(),
            )

        self._write(work)

    def counts(self) -> dict[str, int]:
        """Entries, bytes, and what ``record`` added up over all processes."""
        return self._write(lambda db: dict(db.execute("SELECT name, value FROM counts").fetchall()))

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _evict(self, db: sqlite3.Connection, size: int, *, but: str) -> tuple[int, int]:
        evicted = freed = stuck = 0
        while freed < size:
            oldest = db.execute(
                "SELECT key, bytes FROM entries WHERE key != ? ORDER BY used LIMIT 64 OFFSET ?", (but, stuck)
            ).fetchall()
            if not oldest:
                break
            for key, entry_bytes in oldest:
                try:
                    self._shelf.remove(key)
                except OSError as error:
                    log.warning("the label cache cannot delete an entry: %s", error)
                    stuck += 1
                    continue
                db.execute("DELETE FROM entries WHERE key = ?", (key,))
                evicted, freed = evicted + 1, freed + entry_bytes
                if freed >= size:
                    break
        return evicted, freed

    def _write(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """``work`` in a transaction; a damaged or vanished index is replaced first."""
        with self._lock:
            self._reopen_if_replaced()
            try:
                with _transaction(self._db):
                    return work(self._db)
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                log.warning("the index of the label cache in %s is damaged (%s)", self._shelf.directory, error)
                self._replace()
            with _transaction(self._db):
                return work(self._db)

    def _reopen_if_replaced(self) -> None:
        try:
            if os.stat(self._path).st_ino == self._inode:
                return
        except FileNotFoundError:
            self._shelf.restore()
        self._replace()

    def _replace(self) -> None:
        """Open the index that another process has made meanwhile, or make it."""
        with self._shelf.opening():
            with suppress(FileNotFoundError):
                if os.stat(self._path).st_ino == self._inode:
                    self._remove()
            # Only now: while the old file is open, no new one can have its number.
            self._db.close()
            self._inode = -1
            self._db, self._inode = self._open()

    def _open(self) -> tuple[sqlite3.Connection, int]:
        """The index, made from the files where it is missing, damaged or unfinished; the shelf's lock is held."""
        missing = not self._path.exists()
        db = self._connect()
        try:
            why = "is missing" if missing else _fault(db)
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            why = f"is damaged ({error})"
        if why:
            db.close()
            self._remove()
            db = self._connect()
            self._rebuild(db, why)
        # A power failure may cost the last transactions; kill -9 costs none.
        db.execute("PRAGMA synchronous = NORMAL")
        return db, os.stat(self._path).st_ino

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)

    def _rebuild(self, db: sqlite3.Connection, why: str) -> None:
        started = time.monotonic()
        db.execute("PRAGMA journal_mode = WAL")
        with _transaction(db):
            for statement in _SCHEMA:
                db.execute(statement)
            db.executemany("INSERT INTO entries VALUES (?, ?, ?)", self._rows())
            # Belongs to the transaction: an index without it was never finished.
            db.execute(f"PRAGMA user_version = {_VERSION}")
        entries = _count(db, "entries")
        if entries or why != "is missing":
            log.warning(
                "the index of the label cache in %s %s; made it anew from %d entries in %.1f s",
                self._shelf.directory,
                why,
                entries,
                time.monotonic() - started,
            )

    def _rows(self) -> Iterator[tuple[str, int, int]]:
        for file in self._shelf.entries():
            # Another process may be deleting it.
            with suppress(FileNotFoundError):
                found = file.stat(follow_symlinks=False)
                yield file.name, whole_blocks(found.st_size), found.st_mtime_ns

    def _remove(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self._path}{suffix}").unlink(missing_ok=True)


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise


def _fault(db: sqlite3.Connection) -> str:
    """What is wrong with an index; empty for a sound one."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version != _VERSION:
        return f"has the version {version} instead of {_VERSION}"
    (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
    return "" if verdict == "ok" else f"is damaged ({verdict})"


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    code = getattr(error, "sqlite_errorcode", 0)
    # The low byte is the code, the rest what kind of it.
    return code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or code == sqlite3.SQLITE_IOERR_SHORT_READ


def _count(db: sqlite3.Connection, name: str) -> int:
    (value,) = db.execute("SELECT value FROM counts WHERE name = ?", (name,)).fetchone()
    return int(value)


def _size(db: sqlite3.Connection, key: str) -> int:
    row = db.execute("SELECT bytes FROM entries WHERE key = ?", (key,)).fetchone()
    return int(row[0]) if row else 0
