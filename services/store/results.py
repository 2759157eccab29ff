"""What stages leave behind: metrics, generations, scores and artifacts.

Every write is an upsert on the row's natural key, so that a batch sent twice, or again by the next attempt,
leaves one row each.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Table, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite

from services.contract.records import Artifact, Generation, GenerationPage, MetricPoint, Score
from services.store import schema
from services.store.pages import check_limit, decode_cursor, encode_cursor


def upsert(connection: Connection, table: Table, rows: Iterable[Mapping[str, Any]]) -> None:
    """Inserts rows, or replaces those with the same primary key; of equal keys among ``rows`` the last counts."""
    key = [column.name for column in table.primary_key]
    distinct = {}
    for row in rows:
        storable = {name: _storable(value) for name, value in row.items()}
        distinct[tuple(storable[name] for name in key)] = storable
    if not distinct:
        return
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(table)
    rest = {column.name: statement.excluded[column.name] for column in table.columns if column.name not in key}
    connection.execute(statement.on_conflict_do_update(index_elements=key, set_=rest), list(distinct.values()))


def read_metrics(
    connection: Connection, run_id: str, *, names: Sequence[str] | None, after_step: int
) -> list[MetricPoint]:
    """By name, then step."""
    table = schema.metrics
    query = (
        select(table.c.name, table.c.step, table.c.value)
        .where(table.c.run_id == run_id, table.c.step > after_step)
        .order_by(table.c.name, table.c.step)
    )
    if names is not None:
        query = query.where(table.c.name.in_(names))
    # Rows came in as valid points; building them unchecked keeps a curve of 100,000 points quick.
    return [
        MetricPoint.model_construct(name=name, step=step, value=value)
        for name, step, value in connection.execute(query)
    ]


def read_generations(
    connection: Connection, run_id: str, *, benchmark: str | None, limit: int, cursor: str | None
) -> GenerationPage:
    """By benchmark, then item id."""
    check_limit(limit)
    table = schema.generations
    query = (
        select(*[column for column in table.columns if column.name != "run_id"])
        .where(table.c.run_id == run_id)
        .order_by(table.c.benchmark, table.c.item_id)
        .limit(limit + 1)
    )
    if benchmark is not None:
        query = query.where(table.c.benchmark == benchmark)
    if cursor is not None:
        query = query.where(tuple_(table.c.benchmark, table.c.item_id) > tuple_(*decode_cursor(cursor, str, str)))
    items = [Generation.model_validate(dict(row)) for row in connection.execute(query).mappings()]
    more = encode_cursor(items[limit - 1].benchmark, items[limit - 1].item_id) if len(items) > limit else None
    return GenerationPage(items=items[:limit], next_cursor=more)


def read_item_scores(connection: Connection, run_id: str) -> list[tuple[str, str, Mapping[str, float]]]:
    """(benchmark, item id, per-item scores), as the database gives them."""
    table = schema.generations
    query = select(table.c.benchmark, table.c.item_id, table.c.scores).where(table.c.run_id == run_id)
    return [(benchmark, item_id, scores) for benchmark, item_id, scores in connection.execute(query)]


def read_answers(connection: Connection, run_id: str, items: Sequence[tuple[str, str]]) -> list[Generation]:
    """By benchmark, then item id."""
    table = schema.generations
    query = (
        select(*[column for column in table.columns if column.name != "run_id"])
        .where(table.c.run_id == run_id, tuple_(table.c.benchmark, table.c.item_id).in_(items))
        .order_by(table.c.benchmark, table.c.item_id)
    )
    return [Generation.model_validate(dict(row)) for row in connection.execute(query).mappings()]


def read_scores(connection: Connection, run_id: str) -> list[Score]:
    """By benchmark, then metric."""
    table = schema.scores
    query = (
        select(*[column for column in table.columns if column.name != "run_id"])
        .where(table.c.run_id == run_id)
        .order_by(table.c.benchmark, table.c.metric)
    )
    return [Score.model_validate(dict(row)) for row in connection.execute(query).mappings()]


def read_artifacts(connection: Connection, run_id: str) -> list[Artifact]:
    """By name."""
    query = select(schema.artifacts).where(schema.artifacts.c.run_id == run_id).order_by(schema.artifacts.c.name)
    return [Artifact.model_validate(dict(row)) for row in connection.execute(query).mappings()]


def _storable(value: Any) -> Any:
    """PostgreSQL keeps no NUL characters, which a model may well write; offsets of spans must not shift."""
    return value.replace("\0", "\N{REPLACEMENT CHARACTER}") if isinstance(value, str) else value
