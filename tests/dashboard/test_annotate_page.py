"""The Annotate page: whose turn, what is saved, what is hidden. Marking itself is the browser's part."""

from dashboard.render.marking import pieces
from dashboard.tasks import tasks_of
from services.contract.annotation_records import MarkedSpan, NewAnnotation
from services.reports.annotation import spans_of_words, touched_words, words_of
from tests.dashboard.pages import FINISHED, button, html


def open_as(visit, name):
    app = visit("annotate", sweep=FINISHED)
    app.text_input(key="annotator").input(name).run()
    return app


def shown_output(api, app):
    """The output whose component stands on the page, with its study, by the component's text."""
    (component,) = app.get("bidi_component")
    text = str(component.proto)
    return next(
        (study, output)
        for study in api.world.studies[FINISHED]
        for output in study.outputs
        if f"{output.run_id}-{study.benchmark}-{study.item_id}" in text
    )


def test_a_name_comes_first(api, visit):
    app = visit("annotate", sweep=FINISHED)
    assert "Type your name" in app.info[0].value
    assert not app.get("bidi_component")


def test_nothing_tells_which_method_wrote_the_output(api, visit):
    app = open_as(visit, "ana")
    study, output = shown_output(api, app)
    page = html(app)
    assert study.source[:60] in page
    assert study.reference not in page
    assert output.method not in page
    firsts = {tasks_of(study)[0].output.method for study in api.world.studies[FINISHED]}
    assert len(firsts) == 3


def test_an_output_without_marks_is_saved_as_supported(api, visit):
    app = open_as(visit, "ana")
    study, output = shown_output(api, app)
    button(app, "Save and go on").click().run()
    (saved,) = api.annotations.values()
    assert (saved.run_id, saved.benchmark, saved.item_id) == (output.run_id, study.benchmark, study.item_id)
    assert (saved.annotator, saved.spans) == ("ana", [])
    assert shown_output(api, app)[1] != output
    assert "By ana (1). No alpha: no output has been judged by two people." in [one.value for one in app.caption]


def test_the_detectors_marks_can_be_taken_over(api, visit):
    app = open_as(visit, "ana")
    while not shown_output(api, app)[1].spans:
        button(app, "Skip").click().run()
    _, output = shown_output(api, app)
    app.toggle(key="propose-marks").set_value(True).run()
    button(app, "Save and go on").click().run()
    (saved,) = api.annotations.values()
    words = words_of(output.output)
    touched = touched_words(words, [(span.start, span.end) for span in output.spans])
    assert saved.spans == spans_of_words(words, touched)
    assert saved.spans


def test_one_goes_on_where_one_stopped_and_sees_the_old_marks_again(api, visit):
    first = open_as(visit, "ana")
    study, output = shown_output(api, first)
    api.annotate(
        output.run_id,
        NewAnnotation(
            benchmark=study.benchmark, item_id=study.item_id, annotator="ana", spans=[MarkedSpan(start=0, end=3)]
        ),
    )
    app = open_as(visit, "ana")
    assert shown_output(api, app)[1] != output
    button(app, "Back").click().run()
    assert shown_output(api, app)[1] == output
    button(app, "Save and go on").click().run()
    assert [one.spans for one in api.annotations.values()] == [[MarkedSpan(start=0, end=words_of(output.output)[0][1])]]
    other = open_as(visit, "ben")
    assert shown_output(api, other)[1] == output


def test_a_sweep_without_studies_says_so(api, visit):
    api.world.studies[FINISHED] = []
    assert "Nothing to judge yet" in visit("annotate", sweep=FINISHED).info[0].value


def test_pieces_are_the_text():
    text = " one\ttwo\n<b>🙂</b>  "
    found = pieces(text, hints={1: "why"})
    assert "".join(piece for piece, _, _ in found) == text
    assert [(piece, hint) for piece, hint, is_word in found if is_word] == [
        ("one", ""),
        ("two", "why"),
        ("<b>🙂</b>", ""),
    ]
