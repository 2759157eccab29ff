"""The Case studies page: outputs side by side, moving between items, filters, escaping."""

from services.contract.records import Span
from services.contract.states import State
from tests.dashboard.pages import FINISHED, RUNNING, button, html
from tests.dashboard.seed_studies import by_metric, make_studies


def test_side_by_side_with_marks(api, visit):
    text = html(visit("case_studies", sweep=FINISHED))
    first = api.world.studies[FINISHED][0]
    assert text.count('<article class="sk-card sk-output"') == 3
    assert text.index(">SFT<") < text.index(">KD alpha=0.1<") < text.index(">KD alpha=1<")
    assert first.source[:40] in text
    assert text.count('role="tooltip"') == sum(len(output.spans) for output in first.outputs)
    assert "sk-kind-number" in text
    assert "lr 1e-05 · bs 4 · seed 0" in text


def test_the_detector_whose_spans_are_shown_is_chosen(api, visit):
    first = api.world.studies[FINISHED][0]
    more = [
        Span(start=0, end=4, detector=name, kind="passage", score=0.6, explanation=f"says {name}")
        for name in ("lookback", "consistency")
    ]
    outputs = [output.model_copy(update={"spans": more}) for output in first.outputs]
    api.world.studies[FINISHED][0] = first.model_copy(update={"outputs": outputs})
    app = visit("case_studies", sweep=FINISHED)
    choice = app.segmented_control[0]
    assert choice.options == ["all", "Consistency", "Factual rate"]
    assert "says consistency" in html(app)
    assert "says lookback" not in html(app)
    choice.set_value("lookback").run()
    assert "says lookback" in html(app)
    assert "says consistency" not in html(app)
    app.segmented_control[0].set_value("all").run()
    assert html(app).count("says lookback") == html(app).count("says consistency") == 3


def test_next_and_previous_move_through_all_and_the_address_follows(api, visit):
    app = visit("case_studies", sweep=FINISHED)
    ids = [study.item_id for study in api.world.studies[FINISHED]]
    seen = [app.query_params["item"]]
    for _ in ids[1:]:
        button(app, "Next").click().run()
        seen.append(app.query_params["item"])
    assert seen == ids
    assert button(app, "Next").disabled
    button(app, "Previous").click().run()
    assert app.query_params["item"] == ids[-2]


def test_an_item_can_be_linked_to(api, visit):
    wanted = api.world.studies[FINISHED][7]
    app = visit("case_studies", sweep=FINISHED, item=wanted.item_id)
    assert wanted.source[:60] in html(app)
    assert app.query_params["benchmark"] == wanted.benchmark


def test_filters(api, visit):
    app = visit("case_studies", sweep=FINISHED)
    app.selectbox(key=f"benchmark-{FINISHED}").select("xsum").run()
    assert app.query_params["item"] == "38264402"
    app.selectbox(key=f"benchmark-{FINISHED}").select("all").run()
    app.slider(key=f"least-{FINISHED}").set_value(10).run()
    wide = [study for study in api.world.studies[FINISHED] if round(100 * abs(study.difference)) >= 10]
    assert 0 < len(wide) < 12
    assert len(app.selectbox(key=f"item-{FINISHED}").options) == len(wide)
    app.selectbox(key=f"better-{FINISHED}").select("widest difference: SFT better").run()
    assert "No item differs by that much" in app.info[0].value


def test_the_filter_goes_by_the_widest_difference(api, visit):
    studies = [
        study.model_copy(update={"difference": difference})
        for study, difference in zip(api.world.studies[FINISHED], (0.5, -0.4, 0.3, 0.0), strict=False)
    ]
    api.world.studies[FINISHED] = studies
    app = visit("case_studies", sweep=FINISHED)
    choice = app.selectbox(key=f"better-{FINISHED}")
    assert "KD output that differs most" in choice.help
    for option, places in zip(choice.options, ((0, 1, 2, 3), (0, 2), (1,)), strict=True):
        app.selectbox(key=f"better-{FINISHED}").select(option).run()
        shown = app.selectbox(key=f"item-{FINISHED}").options
        expected = [f"{number}. {studies[place].item_id} " for number, place in enumerate(places, start=1)]
        assert [title[: len(start)] for title, start in zip(shown, expected, strict=True)] == expected
    assert choice.options[1:] == ["widest difference: KD better", "widest difference: SFT better"]


def test_text_of_models_and_articles_is_escaped(api, visit):
    hostile = '<script>alert(1)</script> $x$ **b** <img src=x onerror="alert(1)">'
    first = api.world.studies[FINISHED][0]
    outputs = [output.model_copy(update={"output": hostile, "spans": []}) for output in first.outputs]
    api.world.studies[FINISHED][0] = first.model_copy(
        update={"source": hostile, "reference": hostile, "outputs": outputs}
    )
    text = html(visit("case_studies", sweep=FINISHED))
    assert "<script" not in text
    assert "<img" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt; $x$ **b** &lt;img") == 5


def test_studies_are_read_again_only_when_a_run_changes_state(api, visit):
    app = visit("case_studies", sweep=RUNNING)
    assert "Nothing to compare yet" in app.info[0].value
    api.requests.clear()
    app.run()
    assert not [request for request in api.requests if request.endswith("/case-studies")]
    runs = api.world.runs[RUNNING]
    api.world.set_run(RUNNING, 2, State.SUCCEEDED)
    api.world.studies[RUNNING] = make_studies([runs[0], runs[2]])
    assert html(app.run()).count('<article class="sk-card sk-output"') == 2


def test_items_are_found_by_each_metric(api, visit):
    app = visit("case_studies", sweep=FINISHED)
    box = app.selectbox(key=f"metric-{FINISHED}")
    assert box.options[:2] == ["Unsupported words", "ROUGE-L"]
    box.select("rouge_l").run()
    first = by_metric(api.world.studies[FINISHED], "rouge_l")[0]
    items = app.selectbox(key=f"item-{FINISHED}")
    assert items.options[0].startswith(f"1. {first.item_id} ({100 * first.difference:+.0f} points)")
    items.select_index(0).run()
    assert app.query_params["item"] == first.item_id
    better = "better" if first.difference > 0 else "worse"
    assert f"ROUGE-L: <strong>{100 * abs(first.difference):.1f} points {better}</strong>" in html(app)


def test_what_is_shown_can_be_saved(api, visit):
    app = visit("case_studies", sweep=FINISHED)
    assert [one.proto.label for one in app.get("download_button")] == ["JSON", "Markdown", "HTML"]
    assert "Save these 12:" in [one.value for one in app.markdown]


def test_how_far_detectors_agree(api, visit):
    first = api.world.studies[FINISHED][0]
    output = first.outputs[0]
    half = len(output.output) // 2
    marks = [
        Span(start=0, end=end, detector=detector, kind="word", score=1, explanation="x")
        for detector, end in (("support", half), ("lookback", len(output.output)))
    ]
    api.world.studies[FINISHED][0] = first.model_copy(update={"outputs": [output.model_copy(update={"spans": marks})]})
    app = visit("case_studies", sweep=FINISHED)
    share = half / len(output.output)
    assert f"Support and Factual rate {share:.0%}" in " ".join(one.value for one in app.caption)
