"""People's judgements over HTTP: written, read, measured, exported, and bad ones refused."""

import json

import httpx
import pytest

from services.contract.annotation_records import MarkedSpan, NewAnnotation
from services.contract.api_client import ApiClient
from services.contract.errors import InvalidInputError, NotFoundError
from services.contract.records import Generation
from services.contract.spec import SweepSpec
from services.contract.states import StageKind, State
from services.store.store import Store

OUTPUT = "Ana Lee won 3 prizes"


@pytest.fixture
def run_id(api: ApiClient, store: Store, spec: SweepSpec) -> str:
    run = api.all_runs(api.submit_sweep(spec).id)[0]
    for stage in run.stages:
        attempt = store.begin_attempt(stage.id, worker="w", lease_seconds=60)
        assert attempt is not None
        if stage.kind == StageKind.EVALUATE:
            generation = Generation(
                benchmark="demo_news",
                item_id="a/b",
                source="Ana won.",
                reference="r",
                output=OUTPUT,
                scores={},
                spans=[],
            )
            store.add_generations(attempt, [generation])
        store.end_attempt(attempt, State.SUCCEEDED)
    return run.id


def judged(annotator: str, *spans: tuple[int, int]) -> NewAnnotation:
    marked = [MarkedSpan(start=start, end=end) for start, end in spans]
    return NewAnnotation(benchmark="demo_news", item_id="a/b", annotator=annotator, spans=marked)


def test_written_read_measured_and_exported(api: ApiClient, run_id: str) -> None:
    sweep_id = api.run(run_id).sweep_id
    assert api.annotator_agreement(sweep_id).missing == "no output has been judged by two people"
    assert api.lens_labels(sweep_id) == ""
    written = api.write_annotation(run_id, judged("  ana ", (4, 7), (12, 20)))
    assert (written.annotator, written.run_id) == ("ana", run_id)
    api.write_annotation(run_id, judged("ben", (12, 13)))
    assert [one.annotator for one in api.annotations(sweep_id)] == ["ana", "ben"]
    assert [one.annotator for one in api.annotations(sweep_id, annotator="ben")] == ["ben"]
    agreement = api.annotator_agreement(sweep_id)
    # Words: Ana Lee won 3 prizes; ana marks 2, 4, 5 and ben 4. Disagreement 2 of 5 words; 4 marks among 10.
    assert agreement.alpha == pytest.approx(1 - (2 / 5) / (2 * 4 * 6 / (10 * 9)))
    assert (agreement.shared, agreement.words, agreement.annotators) == (1, 5, {"ana": 1, "ben": 1})
    (record,) = map(json.loads, api.lens_labels(sweep_id).splitlines())
    assert record == {
        "document": "Ana won.",
        "summary": OUTPUT,
        "spans": [{"start": 12, "end": 13}],
        "annotators": 2,
    }
    (alone,) = map(json.loads, api.lens_labels(sweep_id, annotator="ana").splitlines())
    assert alone["spans"] == [{"start": 4, "end": 7}, {"start": 12, "end": 20}]
    of_run = httpx.get(f"{api.url}/v1/runs/{run_id}/annotations", params={"annotator": "ana"}).json()
    assert len(of_run["items"]) == 1


def test_bad_ones_are_refused(api: ApiClient, run_id: str) -> None:
    url = f"{api.url}/v1/runs/{run_id}/annotations"
    good = judged("ana", (0, 3)).model_dump()
    for change, complaint in (
        ({"annotator": "   "}, "body.annotator: String should have at least 1 character, not"),
        ({"item_id": ""}, "body.item_id: String should have at least 1 character, not"),
        ({"annotator": "a\0b"}, "body.annotator: should have no NUL character, not"),
        ({"annotator": "a" * 101}, "body.annotator: String should have at most 100 characters, not"),
        ({"spans": [{"start": 3, "end": 3}]}, "holds no character"),
        ({"spans": [{"start": 0, "end": 99}]}, "beyond the output's 20 characters"),
        ({"spans": [{"start": 0, "end": 3}] * 1001}, "at most 1000"),
        ({"extra": 1}, "extra"),
    ):
        answer = httpx.post(url, json=good | change)
        assert answer.status_code == 422
        assert complaint in answer.text
        assert "pattern" not in answer.text
    with pytest.raises(NotFoundError):
        api.write_annotation("run-none", judged("ana"))
    with pytest.raises(NotFoundError):
        api.annotations("sw-none")
    with pytest.raises(InvalidInputError, match="beyond"):
        api.write_annotation(run_id, judged("ana", (0, 21)))
    assert api.annotations(api.run(run_id).sweep_id) == []
