"""Training examples that nobody labelled: sentences their document supports, and contradictions made from them."""

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.contract.errors import DatasetError
from services.evaluation.consistency.contradictions import corrupt
from services.evaluation.consistency.labelled import Example, group_documents
from services.evaluation.consistency.text import read_words, split_sentences

DOLLY_ROWS = 1200
DOLLY_CATEGORIES = frozenset({"closed_qa", "information_extraction", "summarization"})
LONGEST_CONTEXT = 500
ANSWER_SENTENCES = 3
ARTICLE_SENTENCES = 2
CONTRADICTIONS = 2


@dataclass(frozen=True, kw_only=True)
class Material:
    """Documents that share no text with a labelled one: Dolly's (context, answer) rows and XSum articles."""

    answers: list[tuple[str, str]]
    articles: list[str]


def read_material(folder: Path, *, apart_from: Sequence[Example]) -> Material:
    """From dolly/train_large.jsonl.gz and xsum/test.jsonl. DatasetError names the file that cannot be read."""
    answers = [
        (row["context"], row["response"])
        for row in _rows(folder / "dolly" / "train_large.jsonl.gz")
        if row["category"] in DOLLY_CATEGORIES and 0 < len(row["context"].split()) <= LONGEST_CONTEXT
    ]
    articles = [row["document"] for row in _rows(folder / "xsum" / "test.jsonl")]
    documents = [*(example.document for example in apart_from), *(context for context, _ in answers), *articles]
    groups = group_documents(documents)
    known = set(groups[: len(apart_from)])
    free = [group not in known for group in groups[len(apart_from) :]]
    return Material(
        answers=[answer for answer, is_free in zip(answers, free, strict=False) if is_free],
        articles=[article for article, is_free in zip(articles, free[len(answers) :], strict=True) if is_free],
    )


def make_examples(material: Material, *, seed: int) -> list[Example]:
    """Sentences of answers, contexts and articles, each followed by up to CONTRADICTIONS contradictions of it."""
    generator = random.Random(seed)
    answers = generator.sample(material.answers, min(DOLLY_ROWS, len(material.answers)))
    supported = []
    for context, answer in answers:
        supported += [(context, sentence) for sentence in _some(answer, ANSWER_SENTENCES, generator)]
        supported += [(context, sentence) for sentence in _some(context, 1, generator)]
    for article in material.articles:
        supported += [(article, sentence) for sentence in _some(article, ARTICLE_SENTENCES, generator)]
    foreign = [sentence for _, sentence in supported]
    return [
        example
        for document, sentence in supported
        for example in _contradict(document, sentence, foreign=foreign, generator=generator)
    ]


def _contradict(document: str, sentence: str, *, foreign: Sequence[str], generator: random.Random) -> list[Example]:
    outputs: list[tuple[str, list[tuple[int, int]]]] = [(sentence, [])]
    for _ in range(CONTRADICTIONS):
        corrupted = corrupt(sentence, document=document, foreign=generator.choice(foreign), generator=generator)
        if corrupted:
            outputs.append((corrupted.sentence, corrupted.spans))
    return [
        Example(
            origin="made",
            key="",
            document=document,
            output=output,
            unsupported=bool(spans),
            spans=spans,
        )
        for output, spans in outputs
    ]


def _some(text: str, count: int, generator: random.Random) -> list[str]:
    sentences = _sentences(text)
    return generator.sample(sentences, min(count, len(sentences)))


def _sentences(text: str) -> list[str]:
    """Sentences long enough to say something; list items and fragments are left out."""
    sentences = [text[start:end] for start, end in split_sentences(text)]
    return [sentence for sentence in sentences if 6 <= len(read_words(sentence)) <= 45 and sentence[0].isalnum()]


def _rows(file: Path) -> list[dict]:
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{file} cannot be read: {error}", fix="Name a data folder that holds the sets under --data."
        ) from None
