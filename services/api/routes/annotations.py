"""People's judgements of outputs: written, read, measured, and as training data."""

from collections import defaultdict
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import Response

from services.api.dependencies import StoreHere
from services.contract.annotation_records import Annotation, AnnotationList, AnnotatorAgreement, NewAnnotation
from services.reports.annotation import JudgedOutput, annotator_agreement, judged_outputs, lens_labels
from services.store.store import Store

router = APIRouter(tags=["annotations"])
Annotator = Annotated[str | None, Query(max_length=100, description="Only this person's.")]
LINES = "application/x-ndjson"


@router.post("/runs/{run_id}/annotations", status_code=201)
def write_annotation(run_id: str, annotation: NewAnnotation, store: StoreHere) -> Annotation:
    """Keep what a person marked in one output; it replaces what the same person marked there before."""
    return store.write_annotation(run_id, annotation)


@router.get("/runs/{run_id}/annotations")
def list_annotations(run_id: str, store: StoreHere, annotator: Annotator = None) -> AnnotationList:
    """What people marked in a run's outputs, by benchmark, item and person."""
    return AnnotationList(items=_only(store.annotations(run_id), annotator))


@router.get("/sweeps/{sweep_id}/annotations")
def list_sweep_annotations(sweep_id: str, store: StoreHere, annotator: Annotator = None) -> AnnotationList:
    """What people marked in the outputs of all runs of a sweep."""
    return AnnotationList(items=_only(store.sweep_annotations(sweep_id), annotator))


@router.get("/sweeps/{sweep_id}/annotations/agreement")
def get_agreement(sweep_id: str, store: StoreHere) -> AnnotatorAgreement:
    """How far people agree: Krippendorff's alpha over the words of outputs that two or more judged."""
    return annotator_agreement(_judged(store, store.sweep_annotations(sweep_id)))


@router.get(
    "/sweeps/{sweep_id}/annotations/export",
    response_class=Response,
    responses={200: {"description": "JSON lines.", "content": {LINES: {"schema": {"type": "string"}}}}},
)
def export_annotations(sweep_id: str, store: StoreHere, annotator: Annotator = None) -> Response:
    """Labels that train a lens: document, summary and the spans that most people marked, a JSON object a line."""
    judged = _judged(store, _only(store.sweep_annotations(sweep_id), annotator))
    return Response(lens_labels(judged), media_type=LINES)


def _only(annotations: list[Annotation], annotator: str | None) -> list[Annotation]:
    return [one for one in annotations if annotator is None or one.annotator == annotator]


def _judged(store: Store, annotations: list[Annotation]) -> list[JudgedOutput]:
    items: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for one in annotations:
        items[one.run_id].add((one.benchmark, one.item_id))
    texts = {
        (run_id, answer.benchmark, answer.item_id): (answer.source, answer.output)
        for run_id, wanted in items.items()
        for answer in store.answers(run_id, sorted(wanted))
    }
    return judged_outputs(annotations, texts)
