"""What people marked in outputs: one judgement per person and output, the last one counts."""

from typing import Any

from sqlalchemy import Connection, Select, select
from sqlalchemy.dialects import postgresql, sqlite

from services.contract.annotation_records import Annotation, NewAnnotation
from services.contract.errors import InvalidInputError, NotFoundError
from services.contract.records import Generation
from services.store import schema
from services.store.results import read_answers


def write_annotation(connection: Connection, run_id: str, annotation: NewAnnotation) -> Annotation:
    """NotFoundError for an output that the run does not have, InvalidInputError for spans beyond its end."""
    answers = read_answers(connection, run_id, [(annotation.benchmark, annotation.item_id)])
    if not answers:
        raise NotFoundError(
            f"run {run_id} has no output for item {annotation.item_id!r} of {annotation.benchmark}",
            fix="List its outputs: GET /v1/runs/RUN/generations.",
        )
    _check_spans(annotation, answers[0])
    table = schema.annotations
    row = {**annotation.model_dump(mode="json"), "run_id": run_id}
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(table).values(**row, written_at=schema.now())
    key = [column.name for column in table.primary_key]
    latest = {name: statement.excluded[name] for name in ("spans", "written_at")}
    connection.execute(statement.on_conflict_do_update(index_elements=key, set_=latest))
    query = _select().where(*(table.c[name] == row[name] for name in key))
    return Annotation.model_validate(dict(connection.execute(query).mappings().one()))


def read_annotations(
    connection: Connection, *, run_id: str | None = None, sweep_id: str | None = None
) -> list[Annotation]:
    """Of a run or of all runs of a sweep, by run, benchmark, item and annotator."""
    table = schema.annotations
    query = _select().order_by(*table.primary_key)
    if run_id is not None:
        query = query.where(table.c.run_id == run_id)
    if sweep_id is not None:
        query = query.join(schema.runs, schema.runs.c.id == table.c.run_id).where(schema.runs.c.sweep_id == sweep_id)
    return [Annotation.model_validate(dict(row)) for row in connection.execute(query).mappings()]


def _select() -> Select[Any]:
    return select(*schema.annotations.columns)


def _check_spans(annotation: NewAnnotation, answer: Generation) -> None:
    length = len(answer.output)
    beyond = [span for span in annotation.spans if span.end > length]
    if beyond:
        raise InvalidInputError(
            f"the span [{beyond[0].start}, {beyond[0].end}) reaches beyond the output's {length} characters",
            fix="Count characters as Unicode code points of the output as the API gives it.",
        )
