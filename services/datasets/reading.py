"""Data sets as records: shipped with the project, local files, or the Hugging Face hub.

Every error names the file, the line or row (counted from 1), the column, and what to do.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from services.contract.errors import DatasetError
from services.contract.evaluation_spec import SUMMARISATION, BenchmarkSpec
from services.contract.spec import DatasetSpec
from services.datasets.sources import Row, check_hub, hub_rows, is_local, local_rows

log = logging.getLogger(__name__)

SHIPPED = {"demo_instructions", "demo_news"}
SHIPPED_DIR = Path(__file__).parent / "data"


@dataclass(frozen=True, kw_only=True)
class SummarisationItem:
    """One article and its reference summary."""

    item_id: str
    source: str
    reference: str


@dataclass(frozen=True, kw_only=True)
class _Benchmark:
    path: str
    config: str | None
    split: str
    id: str
    source: str
    reference: str


# Column names and configurations of the data sets' pages on the hub.
_BENCHMARKS = {
    "demo_news": _Benchmark(
        path="demo_news", config=None, split="test", id="id", source="article", reference="highlights"
    ),
    "cnn_dailymail": _Benchmark(
        path="abisee/cnn_dailymail", config="3.0.0", split="test", id="id", source="article", reference="highlights"
    ),
    "xsum": _Benchmark(
        path="EdinburghNLP/xsum", config=None, split="test", id="id", source="document", reference="summary"
    ),
}


def load_records(spec: DatasetSpec, *, offline: bool = False) -> list[dict[str, str]]:
    """The data set's records with Dolly's columns: instruction, context, response, category.

    Context and category are empty text where the data set has none. Raises DatasetError when the data set cannot be
    read, or when a record among the first ``spec.limit`` lacks its instruction or its response.
    """
    if spec.split != "train" and (spec.path in SHIPPED or is_local(spec.path)):
        log.warning("%s is a file and has no splits; split %s is ignored", spec.path, spec.split)
    rows = read_rows(spec.path, split=spec.split, offline=offline)
    records = [_record(row) for row in islice(rows, spec.limit)]
    if not records:
        raise DatasetError(f"{spec.path} holds no record", fix="Name a data set with at least one record.")
    return records


def check_dataset(spec: DatasetSpec, *, offline: bool = False) -> None:
    """Raises DatasetError for what can be known about a data set before any work starts.

    Shipped and local files are read whole; the hub is only asked whether it has the data set.
    """
    if spec.path in SHIPPED or is_local(spec.path):
        load_records(spec)
    else:
        check_hub(spec.path, split=spec.split, offline=offline)


def load_items(spec: BenchmarkSpec, *, limit: int | None = None, offline: bool = False) -> list[SummarisationItem]:
    """The first ``limit`` items of a summarisation benchmark, from ``spec.path`` or the benchmark's own data.

    An item without an id is named by its row. One whose article or reference is empty is left out with a warning:
    the published XSum holds such rows. Raises DatasetError when the data cannot be read, a column is absent, or two
    items share an id.
    """
    assert spec.name in SUMMARISATION
    benchmark = _BENCHMARKS[spec.name]
    path = spec.path or benchmark.path
    rows = read_rows(path, config=benchmark.config, split=benchmark.split, offline=offline)
    items: dict[str, SummarisationItem] = {}
    empty = []
    for row in rows:
        if len(items) == limit:
            break
        item = SummarisationItem(
            item_id=_text(row, benchmark.id, required=False) or str(row.number),
            source=_text(row, benchmark.source, filled=False),
            reference=_text(row, benchmark.reference, filled=False),
        )
        if not (item.source.strip() and item.reference.strip()):
            empty.append(row.place)
            continue
        if item.item_id in items:
            raise DatasetError(
                f"{row.place}: the id {item.item_id!r} was already given to an earlier item",
                fix=f"Give every item its own text in column {benchmark.id}.",
            )
        items[item.item_id] = item
    if empty:
        log.warning("left out %d items without article or reference: %s", len(empty), "; ".join(empty[:10]))
    if not items:
        raise DatasetError(f"{path} holds no item", fix="Name a file with at least one item.")
    return list(items.values())


def check_items(spec: BenchmarkSpec, *, limit: int | None = None, offline: bool = False) -> None:
    """Raises DatasetError for what can be known about a summarisation benchmark before any work starts.

    Like ``check_dataset``: local items are read, the hub is only asked.
    """
    benchmark = _BENCHMARKS[spec.name]
    path = spec.path or benchmark.path
    if path in SHIPPED or is_local(path):
        load_items(spec, limit=limit)
    else:
        check_hub(path, config=benchmark.config, split=benchmark.split, offline=offline)


def read_rows(path: str, *, split: str, offline: bool, config: str | None = None) -> Iterator[Row]:
    """Rows of what ships with the project, of a local file, or of a data set on the hub."""
    if path in SHIPPED:
        return local_rows(SHIPPED_DIR / f"{path}.jsonl")
    if is_local(path):
        return local_rows(Path(path).expanduser())
    return hub_rows(path, config=config, split=split, offline=offline)


def _record(row: Row) -> dict[str, str]:
    return {
        "instruction": _text(row, "instruction"),
        "context": _text(row, "context", required=False),
        "response": _text(row, "response"),
        "category": _text(row, "category", required=False),
    }


def _text(row: Row, column: str, *, required: bool = True, filled: bool = True) -> str:
    """The text of a column; ``required``: the column must be there; ``filled``: a required one must not be blank."""
    value: Any = row.values.get(column)
    if value is None and not required:
        return ""
    if column not in row.values:
        raise DatasetError(
            f"{row.place}: no column {column!r}; its columns are {', '.join(map(repr, row.values)) or 'none'}",
            fix=f"Rename or add the column {column!r}.",
        )
    if not required and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise DatasetError(
            f"{row.place}: column {column!r} holds {type(value).__name__}, not text",
            fix="Write the value as text.",
        )
    if required and filled and not (value and value.strip()):
        raise DatasetError(
            f"{row.place}: column {column!r} is empty", fix="Fill it in, or remove the row from the data set."
        )
    return value or ""
