"""``smoothkd sweep cases``: case studies on the terminal and in files."""

from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from services.cli import sweep_views
from services.contract.api_client import ApiClient
from services.contract.errors import InvalidInputError, NotFoundError
from services.contract.metric_words import metric_title
from services.contract.records import CaseStudy
from services.reports.case_export import FORMATS, export_studies
from services.reports.folder import make_folder

PAGE = 100


def show_cases(sweep_id: str, *, out: Path | None, metric: str, benchmark: str | None, limit: int) -> None:
    """``out`` None prints; else its ending says the form, and the file appears only when it is whole."""
    form = "md" if out is None else out.suffix.removeprefix(".")
    if form not in FORMATS:
        raise InvalidInputError(
            f"{out} has no ending that says its form",
            fix=f"End it in one of {', '.join(f'.{one}' for one in FORMATS)}.",
        )
    with sweep_views.client() as api:
        sweep = api.sweep(sweep_id)
        studies = _read(api, sweep_id, metric=metric, benchmark=benchmark, limit=limit)
        runs = api.all_runs(sweep_id)
    if not studies:
        raise NotFoundError(
            f"sweep {sweep_id} has no item with {metric_title(metric)} of both SFT and a KD run"
            + (f" in {benchmark}" if benchmark else ""),
            fix=f"See which metrics it has: smoothkd sweep show {sweep_id}.",
        )
    text = export_studies(studies, runs, title=f"Case studies of {sweep.name}", form=form)
    if out is None:
        Console().print(Markdown(text))
        return
    make_folder(out.parent)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(out)
    Console().print(f"{out}: {len(studies)} case studies", soft_wrap=True, highlight=False)


def _read(api: ApiClient, sweep_id: str, *, metric: str, benchmark: str | None, limit: int) -> list[CaseStudy]:
    studies: list[CaseStudy] = []
    cursor = None
    while len(studies) < limit:
        page = api.case_studies(
            sweep_id, metric=metric, benchmark=benchmark, limit=min(PAGE, limit - len(studies)), cursor=cursor
        )
        studies += page.items
        cursor = page.next_cursor
        if cursor is None:
            break
    return studies
