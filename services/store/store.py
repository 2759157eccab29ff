"""The store: all that the platform remembers, and the only truth about what is to be done.

Every method is one transaction and safe to call from several threads and processes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Table, select, update
from sqlalchemy.exc import IntegrityError

from services.contract.annotation_records import Annotation, NewAnnotation
from services.contract.errors import InvalidInputError
from services.contract.records import (
    Artifact,
    Generation,
    GenerationPage,
    MetricPoint,
    Problem,
    RunPage,
    RunRecord,
    Score,
    StageRecord,
    SweepPage,
    SweepRecord,
)
from services.contract.spec import SweepSpec
from services.contract.states import State
from services.store import annotations, attempts, results, schema, stages, sweeps
from services.store.database import Database
from services.store.stages import Attempt

__all__ = ["Attempt", "Store"]

MAX_IDEMPOTENCY_KEY = 255


class Store:
    """Sweeps, runs, stages and results in SQLite or PostgreSQL, migrated to the newest schema on opening.

    Raises InvalidInputError for another kind of ``url`` and, in every method, StoreUnavailableError when the
    database does not answer and NotFoundError for an id that does not exist.
    """

    def __init__(self, url: str) -> None:
        self._database = Database(url)

    def close(self) -> None:
        self._database.close()

    def create_sweep(self, spec: SweepSpec, *, idempotency_key: str | None = None) -> SweepRecord:
        """A new sweep with all its runs and stages, or none of it.

        With an ``idempotency_key`` that was used before: the sweep it made then, or ConflictError when that
        was of another specification.
        """
        if idempotency_key is not None and not 1 <= len(idempotency_key) <= MAX_IDEMPOTENCY_KEY:
            raise InvalidInputError(
                f"an idempotency key has 1 to {MAX_IDEMPOTENCY_KEY} characters, not {len(idempotency_key)}",
                fix="Send a UUID, for example.",
            )
        try:
            with self._database.writing() as connection:
                sweep_id = _known_sweep(connection, spec, idempotency_key)
                if sweep_id is None:
                    sweep_id = sweeps.insert_sweep(connection, spec, idempotency_key=idempotency_key)
                    _count_change(connection)
                return sweeps.read_sweep(connection, sweep_id)
        except IntegrityError:
            # Another process inserted the same key between our look and our insert, and has committed now.
            with self._database.reading() as connection:
                sweep_id = _known_sweep(connection, spec, idempotency_key)
                if sweep_id is None:
                    raise
                return sweeps.read_sweep(connection, sweep_id)

    def find_sweep(self, spec: SweepSpec, *, idempotency_key: str) -> SweepRecord | None:
        """The sweep that this key has made, or None; ConflictError when that was of another specification."""
        with self._database.reading() as connection:
            sweep_id = _known_sweep(connection, spec, idempotency_key)
            return None if sweep_id is None else sweeps.read_sweep(connection, sweep_id)

    def sweep(self, sweep_id: str) -> SweepRecord:
        with self._database.reading() as connection:
            return sweeps.read_sweep(connection, sweep_id)

    def sweeps(self, *, limit: int = 50, cursor: str | None = None) -> SweepPage:
        """Newest first. InvalidInputError for a limit outside 1 to 1000 or a foreign cursor, here and below."""
        with self._database.reading() as connection:
            return sweeps.read_sweeps(connection, limit=limit, cursor=cursor)

    def run(self, run_id: str) -> RunRecord:
        with self._database.reading() as connection:
            return sweeps.read_run(connection, run_id)

    def runs(self, sweep_id: str, *, limit: int = 50, cursor: str | None = None) -> RunPage:
        """In the order of ``expand``."""
        with self._database.reading() as connection:
            return sweeps.read_runs(connection, sweep_id, limit=limit, cursor=cursor)

    def stage(self, stage_id: str) -> StageRecord:
        with self._database.reading() as connection:
            return stages.read_stage(connection, stage_id)

    def stage_key(self, stage_id: str) -> str:
        """What its output depends on: ``RunSpec.finetune_key`` or ``decode_key`` of shared stages, else ``key``."""
        with self._database.reading() as connection:
            key = connection.execute(select(schema.stages.c.key).where(schema.stages.c.id == stage_id)).scalar()
            if key is None:
                raise stages.no_stage(stage_id)
            return str(key)

    def stage_inputs(self, stage_id: str) -> list[StageRecord]:
        """The stages whose output this one needs."""
        with self._database.reading() as connection:
            return stages.read_inputs(connection, stage_id)

    def request_cancel(self, sweep_id: str) -> SweepRecord:
        """Cancels the stages that have not begun; those that run learn of it by their heartbeat."""
        with self._changing() as connection:
            stages.cancel_sweep(connection, sweep_id)
            return sweeps.read_sweep(connection, sweep_id)

    def ready_stages(self, *, after: str | None = None) -> list[StageRecord]:
        """Queued stages whose inputs have all succeeded, in the order they should be worked on.

        ``after`` keeps those that need this stage.
        """
        with self._database.reading() as connection:
            return stages.read_ready(connection, after=after)

    def begin_attempt(self, stage_id: str, *, worker: str, lease_seconds: float) -> Attempt | None:
        """Takes the stage for ``lease_seconds``; None when it is not ready, already running or ended."""
        with self._database.writing() as connection:
            attempt = attempts.begin_attempt(connection, stage_id, worker=worker, lease_seconds=lease_seconds)
            if attempt is not None:
                _count_change(connection)
            return attempt

    def heartbeat(self, attempt: Attempt, *, lease_seconds: float) -> bool:
        """Renews the lease; True when the user asked to cancel. StaleAttemptError, here and below, when superseded."""
        with self._database.writing() as connection:
            return attempts.heartbeat(connection, attempt, lease_seconds=lease_seconds)

    def set_progress(self, attempt: Attempt, fraction: float) -> None:
        """The share of the stage that is done, 0 to 1."""
        with self._changing() as connection:
            attempts.set_progress(connection, attempt, fraction)

    def end_attempt(self, attempt: Attempt, state: State, *, problem: Problem | None = None) -> None:
        """Ends the stage succeeded, failed or cancelled; unless it succeeded, all that needs it is skipped."""
        with self._changing() as connection:
            attempts.end_attempt(connection, attempt, state, problem=problem)

    def lose_attempt(self, attempt: Attempt, *, max_attempts: int, problem: Problem) -> State:
        """Ends an attempt whose process died; returns what became of the stage.

        Queued again; failed with ``problem`` once ``max_attempts`` were lost; cancelled where that was asked for.
        """
        with self._changing() as connection:
            return attempts.lose_attempt(connection, attempt, max_attempts=max_attempts, problem=problem)

    def release_attempt(self, attempt: Attempt) -> State:
        """Hands a stage back that its worker has no time to finish; it does not count as lost."""
        with self._changing() as connection:
            return attempts.release_attempt(connection, attempt)

    def reclaim_expired(self, *, max_attempts: int) -> list[StageRecord]:
        """Loses every attempt whose lease ran out, and returns those stages as they are now."""
        with self._database.reading() as connection:
            expired = [row.id for row in connection.execute(attempts.select_expired())]
        reclaimed = []
        for stage_id in expired:
            with self._database.writing() as connection:
                if attempts.reclaim(connection, stage_id, max_attempts=max_attempts):
                    _count_change(connection)
                    reclaimed.append(stages.read_stage(connection, stage_id))
        return reclaimed

    def check_current(self, attempt: Attempt) -> None:
        """StaleAttemptError unless the attempt is the stage's newest and runs; call it before renaming outputs."""
        with self._database.writing() as connection:
            attempts.check_current(connection, attempt)

    def add_metrics(self, attempt: Attempt, points: Sequence[MetricPoint]) -> None:
        """Points replace earlier ones of the same name and step."""
        self._upsert(attempt, schema.metrics, (point.model_dump() for point in points))

    def add_generations(self, attempt: Attempt, generations: Sequence[Generation]) -> None:
        """Generations replace earlier ones of the same benchmark and item."""
        self._upsert(attempt, schema.generations, (generation.model_dump(mode="json") for generation in generations))

    def put_scores(self, attempt: Attempt, scores: Sequence[Score]) -> None:
        """Scores replace earlier ones of the same benchmark and metric."""
        self._upsert(attempt, schema.scores, (score.model_dump() for score in scores))

    def add_artifact(self, attempt: Attempt, artifact: Artifact) -> None:
        """Replaces an earlier artifact of the same run and name."""
        self._upsert(attempt, schema.artifacts, [artifact.model_dump()])

    def metrics(self, run_id: str, *, names: Sequence[str] | None = None, after_step: int = -1) -> list[MetricPoint]:
        """By name, then step."""
        with self._reading_run(run_id) as connection:
            return results.read_metrics(connection, run_id, names=names, after_step=after_step)

    def generations(
        self, run_id: str, *, benchmark: str | None = None, limit: int = 50, cursor: str | None = None
    ) -> GenerationPage:
        """By benchmark, then item id."""
        with self._reading_run(run_id) as connection:
            return results.read_generations(connection, run_id, benchmark=benchmark, limit=limit, cursor=cursor)

    def item_scores(self, run_id: str) -> list[tuple[str, str, Mapping[str, float]]]:
        """(benchmark, item id, per-item scores) of every generation of the run, without its texts."""
        with self._reading_run(run_id) as connection:
            return results.read_item_scores(connection, run_id)

    def answers(self, run_id: str, items: Sequence[tuple[str, str]]) -> list[Generation]:
        """The run's generations for these (benchmark, item id), as far as there are any, by benchmark, then item id."""
        with self._reading_run(run_id) as connection:
            return results.read_answers(connection, run_id, items)

    def scores(self, run_id: str) -> list[Score]:
        """By benchmark, then metric."""
        with self._reading_run(run_id) as connection:
            return results.read_scores(connection, run_id)

    def artifacts(self, run_id: str) -> list[Artifact]:
        """By name."""
        with self._reading_run(run_id) as connection:
            return results.read_artifacts(connection, run_id)

    def write_annotation(self, run_id: str, annotation: NewAnnotation) -> Annotation:
        """Replaces an earlier one of the same person on the same output.

        NotFoundError for an output that the run does not have, InvalidInputError for spans beyond its end.
        """
        # No viewer of a sweep's progress waits for it: the change counter stays as it is.
        with self._database.writing() as connection:
            self._require_run(connection, run_id)
            return annotations.write_annotation(connection, run_id, annotation)

    def annotations(self, run_id: str) -> list[Annotation]:
        """By benchmark, item and annotator."""
        with self._reading_run(run_id) as connection:
            return annotations.read_annotations(connection, run_id=run_id)

    def sweep_annotations(self, sweep_id: str) -> list[Annotation]:
        """Of all runs of a sweep, by run, benchmark, item and annotator."""
        with self._database.reading() as connection:
            sweeps.read_sweep(connection, sweep_id)
            return annotations.read_annotations(connection, sweep_id=sweep_id)

    def change_counter(self) -> int:
        """Grows with every write that a viewer would care about: read it before the data it stands for."""
        with self._database.reading() as connection:
            return int(connection.execute(select(schema.changes.c.counter)).scalar_one())

    def _upsert(self, attempt: Attempt, table: Table, rows: Iterable[Mapping[str, Any]]) -> None:
        with self._changing() as connection:
            run_id = attempts.check_current(connection, attempt).run_id
            assert run_id is not None, f"stage {attempt.stage_id} belongs to several runs: it can leave no results"
            results.upsert(connection, table, ({**row, "run_id": run_id} for row in rows))

    @contextmanager
    def _changing(self) -> Iterator[Connection]:
        with self._database.writing() as connection:
            yield connection
            _count_change(connection)

    @contextmanager
    def _reading_run(self, run_id: str) -> Iterator[Connection]:
        with self._database.reading() as connection:
            self._require_run(connection, run_id)
            yield connection

    def _require_run(self, connection: Connection, run_id: str) -> None:
        if connection.execute(select(schema.runs.c.id).where(schema.runs.c.id == run_id)).first() is None:
            raise sweeps.no_run(run_id)


def _known_sweep(connection: Connection, spec: SweepSpec, idempotency_key: str | None) -> str | None:
    if idempotency_key is None:
        return None
    return sweeps.find_by_idempotency_key(connection, idempotency_key, spec)


def _count_change(connection: Connection) -> None:
    connection.execute(update(schema.changes).values(counter=schema.changes.c.counter + 1))
