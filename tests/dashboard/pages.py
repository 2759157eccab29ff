"""What tests read off a drawn page."""

PAGES = ("sweeps", "runs", "summary", "case_studies", "annotate")
FINISHED, RUNNING, CANCELLED = "sw-0003-finished", "sw-0004-running", "sw-0002-cancelled"


def html(app):
    """All HTML of the page but its style sheet; AppTest has no class of its own for it."""
    bodies = [element.proto.body for element in app.get("html")]
    return "\n".join(body for body in bodies if not body.startswith("<style>"))


def charts(app):
    return app.get("vega_lite_chart")


def button(app, label):
    return next(one for one in app.button if one.label == label)
