"""A sweep's FINETUNE_TEACHER, DECODE and TRAIN stages: as from the command line, with their results in the store."""

import time
from collections.abc import Sequence

from services.contract.records import Artifact, MetricPoint
from services.contract.settings import Settings
from services.contract.spec import RunSpec, expand
from services.store.store import Attempt, Store
from student_trainer.arguments import processes
from student_trainer.decode import decode_responses
from student_trainer.finetune import finetune_teacher
from student_trainer.student import load_tokenizer
from student_trainer.train import train
from student_trainer.watcher import stop_on_signals

SECONDS_BETWEEN_WRITES = 1.0


def run_train(store: Store, attempt: Attempt, settings: Settings) -> None:
    """Train the stage's run into its directory. StaleAttemptError as soon as a newer attempt holds the stage."""
    run_id = store.stage(attempt.stage_id).run_id
    assert run_id is not None, "a TRAIN stage belongs to one run"
    out = settings.runs_dir / run_id
    reports = _Reports(store, attempt)
    try:
        model = train(
            store.run(run_id).spec,
            out=out,
            settings=settings,
            on_metrics=reports.add_metrics,
            on_progress=reports.set_progress,
            before_rename=lambda: store.check_current(attempt),
        )
    finally:
        reports.flush()
    if not processes().is_main_process:
        return
    for name, path in (("model", model), ("run.yaml", out / "run.yaml")):
        relative = str(path.relative_to(settings.data_dir))
        store.add_artifact(attempt, Artifact(run_id=run_id, name=name, path=relative))


def run_decode(store: Store, attempt: Attempt, settings: Settings) -> None:
    """Have the teacher decode the responses that runs of this sweep learn."""
    key = store.stage_key(attempt.stage_id)
    spec = next(spec for spec in _runs_of_stage(store, attempt) if spec.decode_key == key)
    reports = _Reports(store, attempt)
    with stop_on_signals() as stopping:
        decode_responses(
            spec,
            tokenizer=load_tokenizer(spec.student, settings),
            settings=settings,
            on_progress=reports.set_progress,
            should_stop=stopping,
            before_rename=lambda: store.check_current(attempt),
        )


def run_finetune(store: Store, attempt: Attempt, settings: Settings) -> None:
    """Fine-tune the teacher that runs of this sweep learn from."""
    key = store.stage_key(attempt.stage_id)
    spec = next(spec for spec in _runs_of_stage(store, attempt) if spec.finetune_key == key)
    reports = _Reports(store, attempt)
    finetune_teacher(
        spec,
        settings=settings,
        on_progress=reports.set_progress,
        before_rename=lambda: store.check_current(attempt),
    )


def _runs_of_stage(store: Store, attempt: Attempt) -> list[RunSpec]:
    """All runs of the sweep whose stage it is."""
    return expand(store.sweep(store.stage(attempt.stage_id).sweep_id).spec)


class _Reports:
    """Metrics and progress on their way to the store, in batches of a second."""

    def __init__(self, store: Store, attempt: Attempt) -> None:
        self._store = store
        self._attempt = attempt
        self._points: list[MetricPoint] = []
        self._metrics_written = self._progress_written = time.monotonic()

    def add_metrics(self, points: Sequence[MetricPoint]) -> None:
        self._points.extend(points)
        if time.monotonic() - self._metrics_written >= SECONDS_BETWEEN_WRITES:
            self.flush()

    def set_progress(self, share: float) -> None:
        if time.monotonic() - self._progress_written >= SECONDS_BETWEEN_WRITES:
            self._progress_written = time.monotonic()
            self._store.set_progress(self._attempt, share)

    def flush(self) -> None:
        """Write what has not been written."""
        points, self._points = self._points, []
        self._metrics_written = time.monotonic()
        if points:
            self._store.add_metrics(self._attempt, points)
