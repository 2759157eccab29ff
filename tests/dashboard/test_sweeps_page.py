"""The Sweeps page: the list, the form, and stopping a sweep."""

import pytest

from services.contract.shipped import shipped_sweep
from services.contract.spec import expand
from services.contract.spec_reading import load_sweep
from services.contract.states import State
from tests.dashboard.pages import CANCELLED, FINISHED, RUNNING, button, html


def test_lists_states_progress_and_links(api, visit):
    app = visit("sweeps")
    assert html(app).index(RUNNING) < html(app).index(FINISHED) < html(app).index(CANCELLED)
    assert "4 runs: 1 succeeded, 1 failed, 1 running, 1 queued · 60 % done" in html(app)
    links = [link.proto for link in app.get("page_link")]
    assert len(links) == 9
    assert {link.query_string for link in links} == {f"sweep={one}" for one in (RUNNING, FINISHED, CANCELLED)}


def test_the_form_holds_the_demo_and_submits_it_once(api, visit):
    app = visit("sweeps")
    assert "name: demo" in app.text_area(key="spec").value
    submit = button(app, "Submit")
    submit.click().run()
    [success] = app.success
    assert success.value == "Submitted as sw-9000-demo."
    assert api.requests.count("POST /v1/sweeps") == 1
    assert api.world.sweeps["sw-9000-demo"].runs == {State.QUEUED: 3}
    assert "sw-9000-demo" in html(app)
    assert not app.run().success


def test_submitting_again_after_a_lost_answer_makes_no_second_sweep(api, visit):
    app = visit("sweeps")
    api.lose_answer = True
    button(app, "Submit").click().run()
    assert "the answer was lost" in html(app)
    button(app, "Submit").click().run()
    assert app.success[0].value == "Submitted as sw-9000-demo."
    assert len(api.world.sweeps) == 4
    button(app, "Submit").click().run()
    assert len(api.world.sweeps) == 5


def test_mistakes_are_worded_by_the_api(api, visit):
    app = visit("sweeps")
    text = app.text_area(key="spec").value.replace("alpha: [", "alpah: [").replace("epochs: 1", "epochs: 0")
    app.text_area(key="spec").set_value(text)
    button(app, "Submit").click().run()
    assert "grid.alpah: unknown field; did you mean alpha?" in html(app)
    assert "training.epochs: 0: Input should be greater than or equal to 1" in html(app)
    assert "Correct these fields" in html(app)
    assert len(api.world.sweeps) == 3


def test_checking_stores_nothing(api, visit):
    app = visit("sweeps")
    button(app, "Check only").click().run()
    assert "holds together and would make 3 runs" in html(app)
    run = expand(load_sweep(shipped_sweep("demo.yaml")))[1]
    cells = (run.method, f"{run.learning_rate:g}", run.batch_size, run.seed)
    assert "".join(f"<td>{cell}</td>" for cell in cells) in html(app)
    assert len(api.world.sweeps) == 3


def test_an_upload_fills_the_form_and_a_binary_one_is_refused(api, visit):
    app = visit("sweeps")
    upload = app.get("file_uploader")[0]
    upload.set_value(("mine.yaml", b"name: mine", "application/yaml")).run()
    assert app.text_area(key="spec").value == "name: mine"
    app.get("file_uploader")[0].set_value(("bad.yaml", b"\xff\xfe\x00", "application/yaml")).run()
    assert "not UTF-8" in app.error[0].value
    assert app.text_area(key="spec").value == "name: mine"


def test_cancel_asks_and_then_stops(api, visit):
    app = visit("sweeps")
    assert "POST" not in " ".join(api.requests)
    assert "Stop learning-rates?" in html(app)
    app.button(key=f"cancel-{RUNNING}").click().run()
    assert f"POST /v1/sweeps/{RUNNING}/cancel" in api.requests
    assert ">cancelling<" in html(app)
    with pytest.raises(KeyError):
        app.button(key=f"cancel-{RUNNING}")
    with pytest.raises(KeyError):
        app.button(key=f"cancel-{FINISHED}")
