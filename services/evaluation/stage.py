"""A run's EVALUATE stage: what its model generates and scores, into the store."""

import time
from collections.abc import Iterator

from services.contract.records import Generation
from services.contract.settings import Settings
from services.evaluation.evaluate import evaluate
from services.models.card import write_scores
from services.store.store import Attempt, Store

PAGE = 1000
SECONDS_BETWEEN_PROGRESS = 1.0


def run_evaluate(store: Store, attempt: Attempt, settings: Settings) -> None:
    """Evaluates the stage's run as its specification says.

    Generations are stored batch by batch, and those that an earlier attempt stored are not made again.
    StaleAttemptError as soon as a newer attempt holds the stage; other errors as ``evaluate`` raises them.
    """
    run_id = store.stage(attempt.stage_id).run_id
    assert run_id is not None, "an EVALUATE stage belongs to one run"
    last = float("-inf")

    def set_progress(share: float) -> None:
        nonlocal last
        if share >= 1 or time.monotonic() - last >= SECONDS_BETWEEN_PROGRESS:
            last = time.monotonic()
            store.set_progress(attempt, share)

    model = settings.runs_dir / run_id / "model"
    scores = evaluate(
        str(model),
        spec=store.run(run_id).spec.evaluation,
        settings=settings,
        known=_stored_generations(store, run_id),
        on_generations=lambda generations: store.add_generations(attempt, generations),
        on_progress=set_progress,
    )
    store.put_scores(attempt, scores)
    write_scores(model, scores)


def _stored_generations(store: Store, run_id: str) -> Iterator[Generation]:
    cursor = None
    while True:
        page = store.generations(run_id, limit=PAGE, cursor=cursor)
        yield from page.items
        cursor = page.next_cursor
        if cursor is None:
            return
