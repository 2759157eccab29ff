"""What a sweep showed: the summary table and the case studies."""

from bisect import bisect_right
from typing import Annotated

from fastapi import APIRouter, Query

from services.api.dependencies import Cursor, RankingHere, StoreHere
from services.api.evidence import read_answers, read_runs, read_scores
from services.api.summary import UNSUPPORTED, RankedItem, case_studies, compared_runs, summarise
from services.contract.errors import InvalidInputError
from services.contract.records import CaseStudyPage, Summary
from services.store.pages import decode_cursor, encode_cursor

router = APIRouter(tags=["results"])
MAX_CASE_STUDIES = 100
Metric = Annotated[
    str, Query(max_length=100, description="What outputs are compared by: unsupported_words or a per-item metric.")
]


@router.get("/sweeps/{sweep_id}/summary")
def get_summary(sweep_id: str, store: StoreHere) -> Summary:
    """SFT against every KD method: mean and standard deviation over learning rate, batch size and seed."""
    sweep = store.sweep(sweep_id)
    runs = read_runs(store, sweep_id)
    return summarise(sweep, runs, read_scores(store, runs))


@router.get("/sweeps/{sweep_id}/case-studies")
def list_case_studies(
    sweep_id: str,
    store: StoreHere,
    rank: RankingHere,
    benchmark: Annotated[str | None, Query(description="Only this benchmark.")] = None,
    metric: Metric = UNSUPPORTED,
    limit: Annotated[int, Query(ge=1, le=MAX_CASE_STUDIES)] = 20,
    cursor: Cursor = None,
) -> CaseStudyPage:
    """The same item answered by SFT and KD students, where they differ most first, whichever is better."""
    runs = compared_runs(read_runs(store, sweep_id))
    scores = [score for of_run in read_scores(store, runs).values() for score in of_run]
    higher_is_better = {score.metric: score.higher_is_better for score in scores}.get(metric, True)
    ranked = rank(tuple(run.id for run in runs), benchmark, metric, higher_is_better=higher_is_better)
    start = bisect_right(ranked, _decode(cursor)) if cursor is not None else 0
    shown = ranked[start : start + limit]
    return CaseStudyPage(
        items=case_studies(shown, runs, read_answers(store, shown), metric=metric),
        next_cursor=_encode(shown[-1]) if start + limit < len(ranked) else None,
    )


def _encode(item: RankedItem) -> str:
    return encode_cursor(repr(item.difference), item.benchmark, item.item_id)


def _decode(cursor: str) -> RankedItem:
    text, benchmark, item_id = map(str, decode_cursor(cursor, str, str, str))
    try:
        difference = float(text)
        return RankedItem(-abs(difference), benchmark, item_id, difference)
    except ValueError:
        raise InvalidInputError(
            f"{cursor!r} is not a cursor of this list", fix="Pass next_cursor of the page before, unchanged."
        ) from None
