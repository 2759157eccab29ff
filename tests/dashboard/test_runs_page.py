"""The Runs page: curves, the choice of runs, failures."""

from tests.dashboard.pages import FINISHED, RUNNING, charts, html
from tests.dashboard.seed import FAILURE


def test_curves_of_all_metrics_and_runs(api, visit):
    app = visit("runs", sweep=FINISHED)
    titles = [element.value.strip("*") for element in app.markdown]
    assert len(charts(app)) == 7
    for wanted in ("Loss (hard", "Hard loss", "Soft loss", "Learning rate", "Tokens per second", "Gradient norm"):
        assert any(title.startswith(wanted) for title in titles)
    assert html(app).count("KD alpha=0.1 · lr 1e-05 · bs 4 · seed 1") == 1
    assert len(app.multiselect[0].value) == 6


def test_choosing_runs_smoothing_and_logarithms(api, visit):
    app = visit("runs", sweep=FINISHED)
    app.multiselect[0].set_value(["SFT · lr 1e-05 · bs 4 · seed 0"]).run()
    app.slider(key="smoothing").set_value(0.0).run()
    app.toggle(key="log-axes").set_value(True).run()
    assert not app.exception
    assert len(charts(app)) == 7
    assert '"type": "log"' in charts(app)[0].proto.spec
    assert any("240 of soft_loss" in caption.value for caption in app.caption)
    app.multiselect[0].set_value([]).run()
    assert "Choose at least one run" in app.info[0].value


def test_only_what_is_new_is_read(api, visit):
    app = visit("runs", sweep=RUNNING)
    ended, failed, running, _ = (run.id for run in api.world.runs[RUNNING])
    read = [request for request in api.requests if request.endswith("/metrics")]
    assert read == [f"GET /v1/runs/{run}/metrics" for run in (ended, failed, running)]
    api.requests.clear()
    app.run()
    assert [request for request in api.requests if request.endswith("/metrics")] == [f"GET /v1/runs/{running}/metrics"]


def test_failures_say_what_and_fix(api, visit):
    text = html(visit("runs", sweep=RUNNING))
    assert FAILURE.what in text
    assert FAILURE.fix in text


def test_before_the_first_step(api, visit):
    api._add("sw-5000-new", api.world.sweeps[FINISHED].spec)
    app = visit("runs", sweep="sw-5000-new")
    assert "No step has been logged yet" in app.info[0].value
    assert html(app).count(">queued<") == 6
