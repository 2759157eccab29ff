"""Multiple choice: whether the rows of a file are questions with their choices and the right one, as on the hub."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from services.contract.errors import DatasetError
from services.contract.evaluation_spec import MULTIPLE_CHOICE, BenchmarkSpec
from services.datasets.sources import Row, local_rows

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "arc_easy": ("question", "choices", "answerKey"),
    "arc_challenge": ("question", "choices", "answerKey"),
    "hellaswag": ("ctx_a", "ctx_b", "activity_label", "endings", "label"),
    "openbookqa": ("question_stem", "choices", "answerKey"),
    "commonsense_qa": ("question", "choices", "answerKey"),
    "truthfulqa_mc1": ("question", "mc1_targets"),
    "truthfulqa_mc2": ("question", "mc2_targets"),
}


def check_choices(spec: BenchmarkSpec) -> None:
    """Raises DatasetError for the first row of the benchmark's file that is no question, or that there is none.

    That includes questions whose right choice is not told, as in the test splits that some data sets publish.
    """
    assert spec.name in MULTIPLE_CHOICE
    assert spec.path is not None
    empty = True
    for row in local_rows(Path(spec.path).expanduser()):
        empty = False
        _check_row(row, spec.name)
    if empty:
        raise DatasetError(f"{spec.path} holds no item", fix="Name a file with at least one item.")


def _check_row(row: Row, benchmark: str) -> None:
    columns = COLUMNS[benchmark]
    missing = [column for column in columns if row.values.get(column) is None]
    if missing:
        why = f"no column {', '.join(map(repr, missing))}; {benchmark} needs {', '.join(map(repr, columns))}"
    else:
        why = _CHECKS.get(benchmark, _wrong_choices)(row.values) or ""
    if why:
        raise DatasetError(f"{row.place}: {why}", fix="Use a file with the columns that the data set has on the hub.")


def _wrong_choices(values: Mapping[str, Any]) -> str | None:
    texts, labels = _lists(values["choices"], "text", "label")
    if len(texts) < 2:
        return "choices holds no two texts with a label each"
    if values["answerKey"] not in labels:
        return f"answerKey {values['answerKey']!r} is none of the labels {', '.join(map(repr, labels))}"
    return None


def _wrong_five(values: Mapping[str, Any]) -> str | None:
    texts, labels = _lists(values["choices"], "text", "label")
    # The task's own prompt names them A to E.
    if labels != [*"ABCDE"]:
        return f"choices holds {len(texts)} texts with a label each, not five with the labels A to E"
    return _wrong_choices(values)


def _wrong_endings(values: Mapping[str, Any]) -> str | None:
    endings, label = values["endings"], str(values["label"])
    if not (isinstance(endings, list) and len(endings) > 1 and all(isinstance(one, str) for one in endings)):
        return "endings holds no two texts"
    if not (label.isdecimal() and int(label) < len(endings)):
        return f"label {label!r} is the place of none of the {len(endings)} endings"
    return None


def _wrong_mc1(values: Mapping[str, Any]) -> str | None:
    texts, labels = _lists(values["mc1_targets"], "choices", "labels")
    # The library takes the first for the right one, whatever the labels say.
    if len(texts) < 2 or labels != [1] + [0] * (len(texts) - 1):
        return "mc1_targets holds no choices of which the first has the label 1 and all others 0"
    return None


def _wrong_mc2(values: Mapping[str, Any]) -> str | None:
    _, labels = _lists(values["mc2_targets"], "choices", "labels")
    if set(labels) != {0, 1}:
        return "mc2_targets holds no choices of which some have the label 1 and the others 0"
    return None


def _lists(value: Any, texts: str, labels: str) -> tuple[list[Any], list[Any]]:
    """Both lists where they are of one length and the first holds texts; else none."""
    first, second = (value.get(texts), value.get(labels)) if isinstance(value, Mapping) else (None, None)
    if not (isinstance(first, list) and isinstance(second, list) and len(first) == len(second)):
        return [], []
    return (first, second) if all(isinstance(text, str) for text in first) else ([], [])


_CHECKS: Mapping[str, Callable[[Mapping[str, Any]], str | None]] = {
    "hellaswag": _wrong_endings,
    "commonsense_qa": _wrong_five,
    "truthfulqa_mc1": _wrong_mc1,
    "truthfulqa_mc2": _wrong_mc2,
}
