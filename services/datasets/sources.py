"""Rows of a data set, one at a time: JSON Lines (also gzipped) and Parquet files, and data sets on the hub."""

import gzip
import importlib.util
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from services.contract.errors import DatasetError, MissingExtraError

log = logging.getLogger(__name__)

FORMATS = (".jsonl", ".jsonl.gz", ".parquet")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_TIMEOUT_SECONDS = 10.0
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, kw_only=True)
class Row:
    """``number`` counts from 1; ``place`` names source and row as a reader finds it."""

    number: int
    place: str
    values: Mapping[str, Any]


def is_local(path: str) -> bool:
    """Whether a data set's path means a file rather than a hub id: by its ending, by its look, or because it exists."""
    return (
        path.endswith((*FORMATS, ".json", ".csv", ".tsv", ".txt"))
        or Path(path).expanduser().exists()
        or not HUB_ID.fullmatch(path)
    )


def local_rows(path: Path) -> Iterator[Row]:
    """Rows of a .jsonl, .jsonl.gz or .parquet file; blank lines are passed over.

    Raises DatasetError at the first row that cannot be read.
    """
    if path.is_dir():
        raise DatasetError(f"{path} is a directory", fix="Name a .jsonl or .parquet file in it.")
    if not path.is_file():
        raise DatasetError(
            f"there is no file {path} (looked in {Path.cwd()})",
            fix="Correct the path, or name a data set by its id on the hub where one will do.",
        )
    if not path.name.endswith(FORMATS):
        raise DatasetError(f"{path} has an unknown format", fix=f"Convert it to one of {', '.join(FORMATS)}.")
    return _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    place = f"{path}, line {number}"
                    yield Row(number=number, place=place, values=json_object(line, place=place))
    except (OSError, EOFError) as error:
        raise DatasetError(
            f"{path}: cannot be read after line {number}: {error}", fix="Check the file; it may be cut short."
        ) from None


def json_object(line: bytes, *, place: str) -> dict[str, Any]:
    """What a line of JSON Lines holds. DatasetError, which names the ``place``, for what is not an object of text."""
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DatasetError(f"{place}: is not UTF-8: {error}", fix="Save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{place}: is not JSON: {error.msg.removesuffix(' at')} at column {error.colno}",
            fix="Write one JSON object per line.",
        ) from None
    if not isinstance(values, dict):
        raise DatasetError(
            f"{place}: holds {type(values).__name__}, not an object",
            fix="Write one JSON object per line.",
        )
    if _SURROGATE.search(line):
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = str(error.object)[error.start]
            raise DatasetError(
                f"{place}: holds {half!a}, half of a character", fix="Write the whole character, or remove it."
            ) from None
    return values


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtraError(
            f"reading {path} needs pyarrow", fix="Run pip install pyarrow, or convert the file to .jsonl."
        ) from None
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(number=number, place=f"{path}, row {number}", values=values)
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(
            f"{path}: cannot be read after row {number}: {error}", fix="Check that it is a whole Parquet file."
        ) from None


def hub_rows(path: str, *, config: str | None, split: str, offline: bool) -> Iterator[Row]:
    """Rows of a data set on the hub, or of its copy in the local cache when the hub cannot be reached.

    Raises DatasetError when the hub does not know it, or when it is neither reachable nor cached.
    """
    if not importlib.util.find_spec("datasets"):
        raise MissingExtraError(
            f"the data set {path} on the hub needs the datasets library",
            fix="Run pip install 'smoothkd[worker]', or name a local file.",
        )
    data = _load(path, config=config, split=split, unreachable=_why_unreachable(path, offline=offline))
    return (
        Row(number=number, place=f"{path} ({split}), row {number}", values=values)
        for number, values in enumerate(data, start=1)
    )


def _load(path: str, *, config: str | None, split: str, unreachable: str | None) -> Iterable[Mapping[str, Any]]:
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    # Without this the library asks an unreachable hub for half a minute before it looks into its cache.
    datasets.config.HF_HUB_OFFLINE = before or unreachable is not None
    try:
        data: Iterable[Mapping[str, Any]] = datasets.load_dataset(path, config, split=split)
    # The library raises nearly every built-in error for data that is absent, private, malformed or not cached.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = f"{unreachable}, and no copy is in the local cache" if unreachable else _first_line(error)
        raise _hub_error(path, reason) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    return data


def check_hub(path: str, *, split: str, offline: bool, config: str | None = None) -> None:
    """Raises DatasetError when the hub has no such data set, or cannot be asked and the local cache has no copy.

    Where the datasets library is absent, as in a bare API server, the cache is the workers' affair: only a warning.
    """
    unreachable = _why_unreachable(path, offline=offline)
    if unreachable and importlib.util.find_spec("datasets"):
        _load(path, config=config, split=split, unreachable=unreachable)
    elif unreachable:
        log.warning("cannot tell whether the data set %s exists: %s", path, unreachable)


def _why_unreachable(path: str, *, offline: bool) -> str | None:
    """None when the hub has the data set; why it cannot be asked; DatasetError when it knows no such data set."""
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        return "the huggingface_hub library is not installed here"
    if offline or constants.HF_HUB_OFFLINE:
        return "this machine is set to be offline"
    token = get_token()
    try:
        answer = httpx.get(
            f"{constants.ENDPOINT}/api/datasets/{path}",
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=HUB_TIMEOUT_SECONDS,
            follow_redirects=True,
        )
    except httpx.HTTPError as error:
        return f"the hub at {constants.ENDPOINT} does not answer ({_first_line(error) or type(error).__name__})"
    # The hub answers 401 for a data set that does not exist as well as for a private one.
    if answer.status_code in (401, 403, 404):
        raise _hub_error(path, f"the hub at {constants.ENDPOINT} has no such public data set")
    if answer.status_code != 200:
        return f"the hub at {constants.ENDPOINT} answers {answer.status_code}"
    return None


def _hub_error(path: str, reason: str) -> DatasetError:
    return DatasetError(
        f"the data set {path} cannot be loaded: {reason}",
        fix="Correct the id, set HF_TOKEN for a private data set, or name a local .jsonl or .parquet file.",
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
