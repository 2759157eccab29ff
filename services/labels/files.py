"""Labels as files that can be shared: a directory with ``teacher.json``, the teacher's head, and shards of Parquet.

A shard appears whole or not at all, and export adds shards for what is missing; so an interrupted export goes on, and
labels of more records join those that are there. Memory is bounded by a row group, reading and writing.
"""

import fcntl
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from services.contract.errors import InvalidInputError
from services.contract.lm_head import LmHead
from services.contract.sequences import TokenSequence
from services.contract.soft_labels import ScoredSequence
from services.labels.cache import LabelCache, label_key
from services.labels.manifest import (
    MANIFEST,
    Manifest,
    damaged,
    not_of_this_release,
    read_head,
    read_manifest,
    write_manifest,
)
from services.labels.rows import SCHEMA, DamagedRowError, LabelledSequence, UnknownLabelsError, from_row, to_row

GROUP_BYTES = 1024**2
"""Rows of a row group, which is the least that is read for one row; a longer sequence has one to itself."""
SHARD_BYTES = 512 * 1024**2

_IDENTITY = b"smoothkd.labels"


class LabelFiles:
    """A directory of label files, for reading any of its sequences. Safe between threads.

    InvalidInputError names what is missing, damaged or of other labels: the file, and the row where one is to blame.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = read_manifest(directory)
        self._shards = [_Shard(path, identity=self.manifest.identity) for path in _shard_paths(directory)]
        self._places: dict[bytes, tuple[_Shard, int]] = {}
        for shard in self._shards:
            for row, sequence_hash in enumerate(shard.hashes):
                self._places.setdefault(sequence_hash, (shard, row))

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, sequence_hash: object) -> bool:
        return sequence_hash in self._places

    def __iter__(self) -> Iterator[LabelledSequence]:
        """Every sequence once, in the order of the files."""
        for shard, row in self._places.values():
            yield shard.read(row)

    def hashes(self) -> Iterable[bytes]:
        """Which sequences are here."""
        return self._places.keys()

    def read(self, sequence_hash: bytes) -> LabelledSequence | None:
        """The labels of one sequence (``hash_sequence``), or None where they are not here."""
        place = self._places.get(sequence_hash)
        return place[0].read(place[1]) if place else None

    def lm_head(self) -> LmHead | None:
        """The teacher's output head, which exact labels need; None for others."""
        return read_head(self.directory, self.manifest)

    def close(self) -> None:
        for shard in self._shards:
            shard.close()


class LabelWriter:
    """Adds labels to a directory, which is made where it is absent; use it as a context.

    ``already``: hashes of what is there. InvalidInputError where the directory holds labels of another teacher, or made
    in another way, or cannot be written. Labels written when the context is left by an error stay, too.
    """

    def __init__(self, directory: Path, manifest: Manifest, *, head: LmHead | None) -> None:
        self.directory = directory
        self.already: set[bytes] = set()
        self._metadata = {_IDENTITY: manifest.identity.encode()}
        self._schema = SCHEMA.with_metadata(self._metadata)
        self._rows: list[dict[str, Any]] = []
        self._row_bytes = self._shard_bytes = 0
        self._writer: pq.ParquetWriter | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(directory)
        except OSError as error:
            raise _unwritable(directory, error) from None
        try:
            self._begin(manifest, head)
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> "LabelWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, sequence: TokenSequence, scored: ScoredSequence) -> None:
        """Add the labels of a sequence; those that are there already stay as they are."""
        if scored.sequence_hash in self.already:
            return
        self.already.add(scored.sequence_hash)
        row = to_row(sequence, scored)
        self._rows.append(row)
        self._row_bytes += sum(len(part["data"]) for part in row["labels"]) + 16 * len(row["token_ids"])
        if self._row_bytes >= GROUP_BYTES:
            self._write_group()
        if self._shard_bytes >= SHARD_BYTES:
            self._end_shard()

    def close(self) -> None:
        """Write what is left; the last shard appears."""
        try:
            self._write_group()
            self._end_shard()
        finally:
            os.close(self._lock)

    def _begin(self, manifest: Manifest, head: LmHead | None) -> None:
        try:
            for unfinished in self.directory.glob(".labels-*.tmp"):
                unfinished.unlink()
            if (self.directory / MANIFEST).exists():
                self._join(manifest)
            else:
                write_manifest(self.directory, manifest, head=head)
        except OSError as error:
            raise _unwritable(self.directory, error) from None
        numbers = [int(path.stem.removeprefix("labels-")) for path in _shard_paths(self.directory)]
        self._number = max(numbers, default=-1) + 1

    def _join(self, manifest: Manifest) -> None:
        files = LabelFiles(self.directory)
        files.close()
        if files.manifest.identity != manifest.identity:
            raise InvalidInputError(
                f"{self.directory} holds labels of {files.manifest.teacher.model} "
                f"(fingerprint {files.manifest.teacher.fingerprint[:8]}, {files.manifest.options}); these are of "
                f"{manifest.teacher.model} (fingerprint {manifest.teacher.fingerprint[:8]}, {manifest.options})",
                fix="Choose another directory.",
            )
        self.already = set(files.hashes())

    def _write_group(self) -> None:
        if not self._rows:
            return
        try:
            if self._writer is None:
                self._path = self.directory / f"labels-{self._number:05d}.parquet"
                self._number += 1
                # Labels are numbers without repetition, which a dictionary or compression would only slow down.
                self._writer = pq.ParquetWriter(
                    self._unfinished,
                    self._schema,
                    use_dictionary=False,
                    compression="none",
                    write_statistics=False,
                    write_page_checksum=True,
                )
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        except OSError as error:
            self._unfinished.unlink(missing_ok=True)
            raise _unwritable(self.directory, error) from None
        self._shard_bytes += self._row_bytes
        self._rows, self._row_bytes = [], 0

    def _end_shard(self) -> None:
        if self._writer is None:
            return
        writer, self._writer, self._shard_bytes = self._writer, None, 0
        try:
            writer.close()
            with self._unfinished.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(self._unfinished, self._path)
        except OSError as error:
            raise _unwritable(self.directory, error) from None

    @property
    def _unfinished(self) -> Path:
        return self._path.with_name(f".{self._path.name}.tmp")


def import_labels(files: LabelFiles, cache: LabelCache) -> None:
    """Put every sequence into the cache of a teacher, which serves it if it is the teacher of these labels."""
    manifest = files.manifest
    for labelled in files:
        key = label_key(
            fingerprint=manifest.teacher.fingerprint,
            sequence_hash=labelled.message.sequence_hash,
            options=manifest.options,
            label_dtype=manifest.label_dtype,
        )
        cache.put(key, labelled.message.SerializeToString())


class _Shard:
    """One file of Parquet; only its hashes stay in memory."""

    def __init__(self, path: Path, *, identity: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
            schema = self._file.schema_arrow
            if not schema.equals(SCHEMA):
                raise not_of_this_release(path, "it has other columns")
            if (schema.metadata or {}).get(_IDENTITY) != identity.encode():
                raise _of_other_labels(path)
            column = self._file.read(columns=["sequence_hash"], use_threads=False).column("sequence_hash")
        except _PARQUET_ERRORS as error:
            raise damaged(path, _first_line(error)) from None
        self.hashes: list[bytes] = column.to_pylist()
        counts = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._groups = [(group, row) for group, rows in enumerate(counts) for row in range(rows)]

    def read(self, row: int) -> LabelledSequence:
        group, place = self._groups[row]
        try:
            with self._lock:
                table = self._file.read_row_group(group, use_threads=False)
            columns = {name: table.column(name)[place] for name in SCHEMA.names}
            values = {
                name: scalar.values.to_numpy() if name in _ARRAYS else scalar.as_py()
                for name, scalar in columns.items()
            }
            labelled = from_row(values)
        except DamagedRowError as error:
            raise damaged(self._path, str(error), row=row + 1) from None
        except UnknownLabelsError as error:
            raise not_of_this_release(self._path, f"unknown labels in row {row + 1} ({error})") from None
        except _PARQUET_ERRORS as error:
            raise damaged(self._path, _first_line(error), row=row + 1) from None
        if labelled.message.sequence_hash != self.hashes[row]:
            raise damaged(self._path, "its hash has changed since the file was opened", row=row + 1)
        return labelled

    def close(self) -> None:
        with self._lock:
            self._file.close()


_ARRAYS = ("token_ids", "label_positions", "token_logprobs")
# What a reader of Parquet raises when bytes are not what they should be, ArrowInvalid being a ValueError.
_PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError, MemoryError, IndexError, KeyError, TypeError, AttributeError)


def _shard_paths(directory: Path) -> list[Path]:
    return sorted(directory.glob("labels-[0-9][0-9][0-9][0-9][0-9].parquet"))


def _lock(directory: Path) -> int:
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InvalidInputError(
            f"another export is writing to {directory}", fix="Wait for it, or choose another directory."
        ) from None
    return descriptor


def _of_other_labels(path: Path) -> InvalidInputError:
    return InvalidInputError(
        f"{path} holds other labels than {MANIFEST} beside it names, by another teacher or made in another way, or "
        "another release of smoothkd has exported it",
        fix="Delete it where it came from another directory; otherwise export the labels again with this release, to "
        "another directory.",
    )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _unwritable(directory: Path, error: OSError) -> InvalidInputError:
    return InvalidInputError(
        f"cannot write label files to {directory}: {error}", fix="Name a directory with room that may be written to."
    )
