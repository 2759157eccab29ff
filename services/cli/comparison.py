"""``smoothkd compare``: two evaluations, each a directory or a run of the platform."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from services.contract.api_client import ApiClient
from services.contract.errors import InvalidInputError
from services.contract.metric_words import metric_title
from services.contract.records import Generation, Score
from services.contract.settings import Settings
from services.evaluation.subject import read_subject
from services.reports.versus import Evaluation, MetricDifference, Versus, compare_evaluations, read_evaluation
from services.reports.words import interval, p_text

GENERATIONS = "generations.jsonl"
SCORES = "scores.json"
FIX = "Name a directory that `smoothkd evaluate` wrote, or the id of an evaluated run."


def compare_sides(first: str, second: str, *, settings: Settings) -> Versus:
    """B (``second``) against A. The API is asked only for what is no directory here."""
    with ExitStack() as stack:
        sides = []
        for name in (first, second):
            if Path(name).is_dir():
                sides.append(_from_directory(name))
            elif "/" in name:
                raise InvalidInputError(f"there is no directory {name}", fix=FIX)
            else:
                api = stack.enter_context(ApiClient(settings.resolved_api_url, settings.api_key))
                sides.append(_from_run(api, name))
    return compare_evaluations(*sides)


def print_versus(versus: Versus) -> None:
    """A table, what was left out, and the verdict."""
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in ("benchmark", "metric", "A", "B", "B - A", "95 % interval", "p adjusted", "items"):
        table.add_column(column, overflow="fold")
    for one in versus.differences:
        if one.difference is not None:
            table.add_row(*_cells(one))
    console.print(f"A = {versus.a}\nB = {versus.b}", markup=False, soft_wrap=True)
    console.print(table)
    for one in versus.differences:
        if one.missing:
            console.print(
                f"{one.benchmark} {metric_title(one.metric)}: – ({one.missing})", markup=False, soft_wrap=True
            )
    console.print(f"{versus.items} items on both sides{_left_out(versus)}.", markup=False)
    console.print(versus.verdict, markup=False, soft_wrap=True)
    if versus.note:
        console.print(versus.note, markup=False, soft_wrap=True)


def _cells(one: MetricDifference) -> list[str]:
    style = {True: "green", False: "red", None: "default"}[one.b_better]
    return [
        one.benchmark,
        metric_title(one.metric),
        f"{one.mean_a:.2f}",
        f"{one.mean_b:.2f}",
        f"[{style}]{one.difference:+.2f}[/]",
        interval(one.low, one.high),
        p_text(one.p_adjusted),
        str(one.items),
    ]


def _left_out(versus: Versus) -> str:
    if not (versus.only_a or versus.only_b):
        return ""
    return f"; left out {versus.only_a} that only A has and {versus.only_b} that only B has"


def _from_directory(name: str) -> Evaluation:
    folder = Path(name)
    for needed in (GENERATIONS, SCORES):
        if not (folder / needed).is_file():
            raise InvalidInputError(f"{folder} has no {needed}: it holds no finished evaluation", fix=FIX)
    try:
        scores = TypeAdapter(list[Score]).validate_json((folder / SCORES).read_bytes())
    except ValidationError as error:
        raise InvalidInputError(f"{folder / SCORES} holds no scores: {error.errors()[0]['msg']}", fix=FIX) from None
    subject = read_subject(folder)
    return read_evaluation(
        name,
        _lines(folder / GENERATIONS),
        scores,
        judged_by=subject.judged_by if subject else None,
        max_new_tokens=subject.max_new_tokens if subject else None,
    )


def _from_run(api: ApiClient, run_id: str) -> Evaluation:
    spec = api.run(run_id).spec.evaluation
    return read_evaluation(
        run_id,
        _generations(api, run_id),
        api.scores(run_id),
        max_new_tokens=spec.max_new_tokens,
    )


def _lines(file: Path) -> Iterator[Generation]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield Generation.model_validate_json(line)
            except ValidationError as error:
                what = f"{file}, line {number} is no generation: {error.errors()[0]['msg']}"
                raise InvalidInputError(what, fix="Finish the evaluation again with the same --out.") from None


def _generations(api: ApiClient, run_id: str) -> Iterator[Generation]:
    cursor = None
    while True:
        page = api.generations(run_id, limit=500, cursor=cursor)
        yield from page.items
        cursor = page.next_cursor
        if cursor is None:
            return
