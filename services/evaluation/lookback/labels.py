"""Summaries whose hallucinated characters are known: read from JSON lines, or from a folder of XSumFaith."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.contract.errors import DatasetError
from services.datasets.sources import json_object
from services.evaluation.lookback.examples import Characters

FORM = 'Each line is an object like {"document": "...", "summary": "...", "spans": [{"start": 0, "end": 7}]}.'


@dataclass(frozen=True, kw_only=True)
class LabelledSummary:
    """``spans`` holds the hallucinated characters; ``labelled`` is False where nobody has looked yet."""

    document: str
    summary: str
    spans: tuple[Characters, ...] = ()
    labelled: bool = True

    @property
    def is_hallucinated(self) -> bool:
        return bool(self.spans)


def read_labels(path: Path) -> list[LabelledSummary]:
    """Every labelled summary of a JSONL file, or of a folder that holds XSumFaith as documents.jsonl and spans.jsonl.

    A line without ``spans`` is unlabelled. DatasetError names the line that cannot be used.
    """
    if path.is_dir():
        return _read_xsumfaith(path)
    summaries = [_read_line(record, where) for record, where in _records(path)]
    if not summaries:
        raise DatasetError(f"{path} holds no record", fix=FORM)
    return summaries


def words_of(text: str) -> list[Characters]:
    """The characters of each word: what white space separates."""
    words, start = [], 0
    for word in text.split():
        start = text.index(word, start)
        words.append((start, start + len(word)))
        start += len(word)
    return words


def overlaps(characters: Characters, spans: tuple[Characters, ...]) -> bool:
    """Whether any of the characters lies in one of the spans."""
    start, end = characters
    return any(start < span_end and span_start < end for span_start, span_end in spans)


def _read_line(record: Mapping[str, Any], where: str) -> LabelledSummary:
    for column in ("document", "summary"):
        if not isinstance(record.get(column), str) or not record[column].strip():
            raise DatasetError(f"{where} has no text in {column!r}", fix=FORM)
    spans = record.get("spans")
    if spans is not None and not isinstance(spans, list):
        raise DatasetError(f"{where}: spans is not a list", fix=FORM)
    length = len(record["summary"])
    characters = [_read_span(span, length, where) for span in spans or []]
    return LabelledSummary(
        document=record["document"],
        summary=record["summary"],
        spans=tuple(sorted(characters)),
        labelled=spans is not None,
    )


def _read_span(span: Any, length: int, where: str) -> Characters:
    start, end = (span.get("start"), span.get("end")) if isinstance(span, Mapping) else (None, None)
    if not (type(start) is int and type(end) is int and 0 <= start < end <= length):
        raise DatasetError(f"{where}: {span!r} is no span of the summary's {length} characters", fix=FORM)
    return start, end


def _read_xsumfaith(folder: Path) -> list[LabelledSummary]:
    """Labels per word by the majority of three annotators (Maynez et al. 2020), joined to spans."""
    documents = {}
    for record, where in _records(folder / "documents.jsonl"):
        _check_columns(record, {"bbcid": str, "document": str}, where)
        documents[record["bbcid"]] = record["document"]
    summaries = []
    for record, where in _records(folder / "spans.jsonl"):
        _check_columns(record, {"bbcid": str, "summary": str, "token_hallucinated": list}, where)
        words = words_of(record["summary"])
        if record["bbcid"] not in documents or len(words) != len(record["token_hallucinated"]):
            raise DatasetError(f"{where} does not belong to its document or its words", fix="Fetch the data set anew.")
        summaries.append(
            LabelledSummary(
                document=documents[record["bbcid"]],
                summary=record["summary"],
                spans=_join(words, record["token_hallucinated"]),
            )
        )
    return summaries


def _check_columns(record: Mapping[str, Any], columns: Mapping[str, type], where: str) -> None:
    wrong = [name for name, kind in columns.items() if not isinstance(record.get(name), kind)]
    if wrong:
        raise DatasetError(
            f"{where}: nothing usable under {', '.join(wrong)}",
            fix=f"A folder is read as XSumFaith; name a file for labels of your own. {FORM}",
        )


def _join(words: list[Characters], hallucinated: list[int]) -> tuple[Characters, ...]:
    spans: list[Characters] = []
    last_was = False
    for (start, end), is_hallucinated in zip(words, hallucinated, strict=True):
        if is_hallucinated and last_was:
            spans[-1] = (spans[-1][0], end)
        elif is_hallucinated:
            spans.append((start, end))
        last_was = bool(is_hallucinated)
    return tuple(spans)


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error}", fix=FORM) from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path.name} line {number}"
            yield json_object(line, place=where), where
