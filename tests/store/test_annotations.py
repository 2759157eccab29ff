"""People's judgements in the store: one per person and output, refused where they fit no output."""

import pytest

from services.contract.annotation_records import MarkedSpan, NewAnnotation
from services.contract.errors import InvalidInputError, NotFoundError
from services.contract.records import Generation
from services.store.store import Store
from tests.store.examples import begin, example_sweep, finish, stage_ids


@pytest.fixture
def run_id(store: Store) -> str:
    """A run with one output of 11 characters, one of them outside of the basic plane."""
    sweep = store.create_sweep(example_sweep())
    train, evaluate = stage_ids(store, sweep)
    finish(store, train)
    output = Generation(
        benchmark="demo_news", item_id="1", source="s", reference="r", output="a 🙂 was here", scores={}, spans=[]
    )
    store.add_generations(begin(store, evaluate), [output])
    return store.runs(sweep.id).items[0].id


def judged(annotator: str, *spans: tuple[int, int], item_id: str = "1") -> NewAnnotation:
    marked = [MarkedSpan(start=start, end=end) for start, end in spans]
    return NewAnnotation(benchmark="demo_news", item_id=item_id, annotator=annotator, spans=marked)


def test_a_later_judgement_of_the_same_person_replaces_the_earlier(store: Store, run_id: str) -> None:
    first = store.write_annotation(run_id, judged("ana", (0, 1)))
    store.write_annotation(run_id, judged("ben"))
    second = store.write_annotation(run_id, judged("ana", (2, 3), (4, 12)))
    assert [(one.annotator, len(one.spans)) for one in store.annotations(run_id)] == [("ana", 2), ("ben", 0)]
    assert store.annotations(run_id)[0] == second
    assert second.written_at >= first.written_at
    sweep_id = store.run(run_id).sweep_id
    assert store.sweep_annotations(sweep_id) == store.annotations(run_id)
    other = store.create_sweep(example_sweep(name="other"))
    assert store.sweep_annotations(other.id) == []


def test_what_fits_no_output_is_refused(store: Store, run_id: str) -> None:
    # Code points, as in Python: the emoji counts one, so that the output has 12.
    with pytest.raises(InvalidInputError, match=r"the span \[11, 13\) reaches beyond the output's 12 characters"):
        store.write_annotation(run_id, judged("ana", (11, 13)))
    with pytest.raises(NotFoundError, match="no output for item '2'"):
        store.write_annotation(run_id, judged("ana", item_id="2"))
    with pytest.raises(NotFoundError, match="there is no run"):
        store.write_annotation("run-none", judged("ana"))
    with pytest.raises(NotFoundError):
        store.sweep_annotations("sw-none")
    assert store.annotations(run_id) == []


def test_a_judgement_does_not_wake_those_who_watch_a_sweep(store: Store, run_id: str) -> None:
    before = store.change_counter()
    store.write_annotation(run_id, judged("ana"))
    assert store.change_counter() == before
