"""Questions about paragraphs, answered in words: HotpotQA in its distractor setting (Yang et al. 2018)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.contract.errors import DatasetError
from services.contract.evaluation_spec import QUESTIONS, BenchmarkSpec
from services.datasets.reading import read_rows
from services.datasets.sources import Row, check_hub

PATH, CONFIG, SPLIT = "hotpotqa/hotpot_qa", "distractor", "validation"
COLUMNS = "id, question, answer, and context with title and sentences"


@dataclass(frozen=True, kw_only=True)
class QuestionItem:
    """One question, its right answer, and the paragraphs that hold it among others that do not."""

    item_id: str
    question: str
    source: str
    reference: str


def load_questions(spec: BenchmarkSpec, *, limit: int | None = None, offline: bool = False) -> list[QuestionItem]:
    """The first ``limit`` questions, from ``spec.path`` or the hub.

    A paragraph is its title, a colon and its sentences, on a line of its own. Raises DatasetError when the data cannot
    be read, a row lacks a column, or two items share an id.
    """
    assert spec.name in QUESTIONS
    items: dict[str, QuestionItem] = {}
    # A file is one split, whatever it is called.
    split = SPLIT if spec.path is None else "test"
    for row in read_rows(spec.path or PATH, config=CONFIG, split=split, offline=offline):
        if len(items) == limit:
            break
        item = _item(row)
        if item.item_id in items:
            raise DatasetError(f"{row.place}: the id {item.item_id!r} was already given", fix="Give each its own id.")
        items[item.item_id] = item
    if not items:
        raise DatasetError(f"{spec.path or PATH} holds no item", fix="Name a file with at least one item.")
    return list(items.values())


def check_questions(spec: BenchmarkSpec, *, limit: int | None = None, offline: bool = False) -> None:
    """Raises DatasetError for what can be known before any work starts: local items are read, the hub is only asked."""
    if spec.path is not None:
        load_questions(spec, limit=limit)
    else:
        check_hub(PATH, config=CONFIG, split=SPLIT, offline=offline)


def _item(row: Row) -> QuestionItem:
    texts = {name: row.values.get(name) for name in ("id", "question", "answer")}
    wrong = [name for name, text in texts.items() if not isinstance(text, str) or not text.strip()]
    paragraphs = _paragraphs(row.values.get("context"))
    if wrong or paragraphs is None:
        names = ", ".join([*wrong, *(["context"] if paragraphs is None else [])])
        raise DatasetError(f"{row.place}: nothing usable under {names}", fix=f"Every row needs {COLUMNS}.")
    return QuestionItem(
        item_id=str(texts["id"]),
        question=str(texts["question"]).strip(),
        source="\n".join(paragraphs),
        reference=str(texts["answer"]).strip(),
    )


def _paragraphs(context: Any) -> list[str] | None:
    if not isinstance(context, Mapping):
        return None
    titles, sentences = context.get("title"), context.get("sentences")
    if not isinstance(titles, list) or not isinstance(sentences, list) or len(titles) != len(sentences) or not titles:
        return None
    return [f"{title}: {''.join(parts).strip()}" for title, parts in zip(titles, sentences, strict=True)]
