"""Soft labels on disk, so that a teacher computes none twice: one file per sequence and way of labelling.

Several processes of one machine may share a directory. A process may be killed at any moment, files may be damaged or
deleted under a running teacher, the disk may fill up: what is served is whole or computed again, and a request never
fails because of its cache.
"""

import errno
import hashlib
import itertools
import json
import logging
import os
import sqlite3
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from services.contract.release import LABEL_FORMAT
from services.contract.sequences import LabelOptions
from services.labels.entry import DamagedEntryError, bytes_on_disk, read_entry, write_entry
from services.labels.index import Index
from services.labels.shelf import Shelf, is_key, unusable

log = logging.getLogger(__name__)

RESERVE_BYTES = 1024**3
"""Left free on the file system for others, whatever the bound of the cache."""
SECONDS_BETWEEN_RECORDS = 2.0
"""How long uses and counts gather before the index notes them: a hit itself writes nothing."""

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_UNREADABLE = {errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EIO}
"""What an entry cannot be read for, now or later; others, such as too many open files, say nothing against it."""
_KEY_VERSION = 1 + LABEL_FORMAT
"""Labels that this release could not read have other keys."""


def label_key(*, fingerprint: str, sequence_hash: bytes, options: LabelOptions, label_dtype: str) -> str:
    """64 hex digits of all that labels depend on: teacher, tokens, positions, and what counts of the options.

    What does not count for an encoding is left out, so that runs which differ only there share their labels:
    ``label_dtype``, the type in which hidden states travel, goes with exact and projected labels alone.
    """
    content: dict[str, object] = {
        "version": _KEY_VERSION,
        "fingerprint": fingerprint,
        "sequence": sequence_hash.hex(),
        "encoding": options.encoding,
    }
    if options.encoding in ("exact", "projected"):
        content["dtype"] = label_dtype
    if options.encoding in ("top_k", "sampled", "projected"):
        content["temperature"] = float(options.temperature)
    if options.encoding == "top_k":
        content["k"] = options.k
    if options.encoding == "sampled":
        content |= {"draws": options.draws, "seed": options.seed}
    if options.encoding == "projected":
        content["student_head"] = options.student_head
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Counts:
    """``damaged``: entries dropped because they were not whole; ``failed``: labels that could not be kept;
    ``evicted``: entries deleted to make room.
    """

    hits: int = 0
    misses: int = 0
    stored: int = 0
    evicted: int = 0
    damaged: int = 0
    failed: int = 0


@dataclass(frozen=True, kw_only=True)
class CacheStats:
    """``bytes`` on disk, in whole blocks; ``since_start`` by this process; ``ever`` by all that share the directory."""

    entries: int = 0
    bytes: int = 0
    max_bytes: int = 0
    since_start: Counts = field(default_factory=Counts)
    ever: Counts = field(default_factory=Counts)


class LabelCache:
    """At most ``max_bytes`` of labels in ``directory``, and ``reserve_bytes`` left free beside them; the labels that
    were unused longest go first. Safe between threads and between processes of one machine; close it in the end.

    InvalidInputError where the directory cannot be used. After that nothing raises for what the disk does: ``get``
    then misses and ``put`` keeps nothing, with a warning and a count.
    """

    def __init__(self, directory: Path, *, max_bytes: int, reserve_bytes: int = RESERVE_BYTES) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self._reserve_bytes = reserve_bytes
        self._shelf = Shelf(directory)
        try:
            with self._shelf.opening():
                self._index = Index(self._shelf)
        except (OSError, sqlite3.Error) as error:
            self._shelf.close()
            raise unusable(directory, str(error)) from None
        self._lock = threading.Lock()
        self._used: dict[str, int] = {}
        self._counts: Counter[str] = Counter()
        self._recorded: Counter[str] = Counter()
        self._warned: set[str] = set()
        self._names = itertools.count()
        self._closing = threading.Event()
        self._recorder = threading.Thread(target=self._record_until_closed, name="label-cache", daemon=True)
        self._recorder.start()

    def __enter__(self) -> "LabelCache":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def get(self, key: str) -> bytes | None:
        """What was put under ``key``, checked; None where it is not there or not whole any more."""
        assert is_key(key), key
        path = self._shelf.entry(key)
        try:
            payload = read_entry(path, key=key)
        except FileNotFoundError:
            self._count("misses")
        except DamagedEntryError as error:
            self._drop_aloud(key, str(error))
        except OSError as error:
            if error.errno in _UNREADABLE:
                self._drop_aloud(key, os.strerror(error.errno))
            else:
                self._warn_once(f"the label cache cannot read: {error}", about="reading")
                self._count("misses")
        else:
            with self._lock:
                self._counts["hits"] += 1
                self._used[key] = time.time_ns()
            return payload
        return None

    def put(self, key: str, payload: bytes) -> None:
        """Keep ``payload``, unless the disk does not allow it; what is there under ``key`` already stays."""
        assert is_key(key), key
        if self._closing.is_set() or bytes_on_disk(len(payload)) > self.max_bytes or self._shelf.entry(key).exists():
            return
        try:
            try:
                stored = self._store(key, payload)
            except (OSError, sqlite3.Error) as error:
                if not _is_no_space(error):
                    raise
                self._warn_once(f"the disk of the label cache in {self.directory} is full: {error}", about="space")
                # More than this entry: others are being written at the same time.
                self._count(evicted=self._index.free(4 * bytes_on_disk(len(payload))))
                stored = self._store(key, payload)
        except (OSError, sqlite3.Error) as error:
            self._warn_once(f"the label cache in {self.directory} cannot keep labels: {error}", about="writing")
            stored = False
        self._count("stored" if stored else "failed")

    def stats(self) -> CacheStats:
        """What lies here and how often it was of use."""
        self._record()
        with self._lock:
            since_start = dict(self._counts)
        try:
            ever = self._index.counts()
        except (OSError, sqlite3.Error) as error:
            self._warn_once(f"the label cache in {self.directory} cannot count: {error}", about="counting")
            ever = {}
        return CacheStats(
            entries=ever.pop("entries", 0),
            bytes=ever.pop("bytes", 0),
            max_bytes=self.max_bytes,
            since_start=Counts(**since_start),
            ever=Counts(**ever),
        )

    def clear(self) -> None:
        """Delete all labels; the counts stay. InvalidInputError where the disk refuses."""
        try:
            self._index.clear()
        except (OSError, sqlite3.Error) as error:
            raise unusable(self.directory, str(error)) from None

    def close(self) -> None:
        """Note the last uses and leave the directory."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._recorder.join()
        self._record()
        self._index.close()
        self._shelf.close()

    def _store(self, key: str, payload: bytes) -> bool:
        if not self._shelf.writing.exists():
            self._shelf.restore()
        spare = self._shelf.free_bytes() - self._reserve_bytes
        room, evicted = self._index.reserve(
            key, bytes_on_disk(len(payload)), max_bytes=self.max_bytes, spare_bytes=spare
        )
        self._count(evicted=evicted)
        if not room:
            self._warn_once(
                f"no room for labels in {self.directory}: its disk has {spare + self._reserve_bytes} bytes free, "
                f"{self._reserve_bytes} of them for others",
                about="space",
            )
            return False
        unfinished = self._shelf.writing / str(next(self._names))
        try:
            write_entry(unfinished, key=key, payload=payload)
            self._index.publish(key, lambda: self._appear(unfinished, key))
        except BaseException:
            self._drop(key)
            raise
        finally:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
        return True

    def _appear(self, unfinished: Path, key: str) -> None:
        path = self._shelf.entry(key)
        path.parent.mkdir(exist_ok=True)
        os.replace(unfinished, path)

    def _drop_aloud(self, key: str, why: str) -> None:
        path = self._shelf.entry(key)
        self._count("misses", "damaged")
        try:
            self._index.drop(key)
        except (OSError, sqlite3.Error) as error:
            self._warn_once(f"the label cache cannot drop {path} ({why}): {error}", about="dropping")
        else:
            log.warning("the label cache drops %s: %s; the teacher computes these labels again", path, why)

    def _drop(self, key: str) -> None:
        with suppress(OSError, sqlite3.Error):
            self._index.drop(key)

    def _count(self, *names: str, evicted: int = 0) -> None:
        with self._lock:
            self._counts.update(names)
            if evicted:
                self._counts["evicted"] += evicted

    def _warn_once(self, message: str, *, about: str) -> None:
        with self._lock:
            if about in self._warned:
                return
            self._warned.add(about)
        log.warning("%s (said once; see the count of failures)", message)

    def _record_until_closed(self) -> None:
        while not self._closing.wait(SECONDS_BETWEEN_RECORDS):
            self._record()

    def _record(self) -> None:
        with self._lock:
            used, self._used = self._used, {}
            counts = self._counts - self._recorded
            self._recorded = self._counts.copy()
        if not used and not counts:
            return
        try:
            self._index.record(used, counts)
        except (OSError, sqlite3.Error) as error:
            self._warn_once(f"the label cache in {self.directory} cannot note uses: {error}", about="counting")


def _is_no_space(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _NO_SPACE
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
