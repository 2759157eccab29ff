"""Labels from a judge: an OpenAI-compatible endpoint marks what a document does not support in its summary."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from services.contract.errors import ApiUnavailableError, AuthenticationError, InvalidInputError
from services.evaluation.lookback.examples import Characters
from services.evaluation.lookback.labels import LabelledSummary, read_labels

ATTEMPTS = 5
REQUEST = """You check whether a summary is supported by its document.

Document:
{document}

Summary:
{summary}

List every part of the summary that the document does not state or imply: wrong or invented names, numbers, dates,
relations and claims. Copy each part from the summary exactly, as short as possible. Judge by the document alone.
Answer with JSON and nothing else: {{"unsupported": ["first part", "second part"]}}, or {{"unsupported": []}}."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """``url`` is the endpoint's base, for example http://localhost:8000/v1. ``pause`` seconds pass before the first
    retry, twice as many before each further one."""

    url: str
    model: str
    api_key: str | None = None
    timeout: float = 120.0
    pause: float = 1.0


@dataclass(frozen=True, kw_only=True)
class JudgedSummaries:
    """``unusable`` counts answers that could not be read, ``not_found`` parts that are not in their summary."""

    summaries: list[LabelledSummary]
    unusable: int
    not_found: int


def judge_summaries(
    summaries: Sequence[LabelledSummary], judge: Judge, *, out: Path, progress: Callable[[int, int], None] | None = None
) -> JudgedSummaries:
    """Labels every summary that has none. Each label is added to ``out`` as a line of JSON as soon as it is known.

    A label that ``out`` already holds is not asked for again, so an interrupted run goes on where it was. Summaries
    whose answer cannot be read stay unlabelled. ApiUnavailableError, AuthenticationError or InvalidInputError where
    the endpoint gives no answer.
    """
    _drop_cut_line(out)
    known = {(kept.document, kept.summary): kept for kept in read_labels(out)} if _has_lines(out) else {}
    judged, unusable, not_found = [], 0, 0
    headers = {"Authorization": f"Bearer {judge.api_key}"} if judge.api_key else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    with httpx.Client(headers=headers, timeout=judge.timeout) as http, out.open("a", encoding="utf-8") as file:
        for number, item in enumerate(summaries, start=1):
            labelled = item if item.labelled else known.get((item.document, item.summary))
            if labelled is None:
                parts = _read_parts(_ask(http, judge, item))
                if parts is None:
                    unusable += 1
                    labelled = item
                else:
                    spans = [_find(part, item.summary) for part in parts]
                    not_found += spans.count(None)
                    found = tuple(sorted({span for span in spans if span is not None}))
                    labelled = replace(item, spans=found, labelled=True)
                    _write(file, labelled)
            judged.append(labelled)
            if progress:
                progress(number, len(summaries))
    return JudgedSummaries(summaries=judged, unusable=unusable, not_found=not_found)


def _drop_cut_line(path: Path) -> None:
    """What is left of a line whose writing was interrupted; its summary is judged again."""
    if _has_lines(path) and not (content := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def _has_lines(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _write(file: Any, item: LabelledSummary) -> None:
    spans = [{"start": start, "end": end} for start, end in item.spans]
    file.write(json.dumps({"document": item.document, "summary": item.summary, "spans": spans}) + "\n")
    file.flush()


def _ask(http: httpx.Client, judge: Judge, item: LabelledSummary) -> str:
    body = {
        "model": judge.model,
        "temperature": 0,
        "messages": [{"role": "user", "content": REQUEST.format(document=item.document, summary=item.summary)}],
    }
    failure = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(judge.pause * 2 ** (attempt - 1))
        try:
            answer = http.post(f"{judge.url.rstrip('/')}/chat/completions", json=body)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            failure = str(error) or type(error).__name__
            continue
        if answer.is_success:
            return _content(answer)
        failure = f"status {answer.status_code}: {answer.text[:200]}"
        if answer.status_code in (401, 403):
            raise AuthenticationError(f"the judge at {judge.url} refuses the key", fix="Give a valid key for it.")
        if answer.status_code != 429 and answer.status_code < 500:
            raise InvalidInputError(f"the judge at {judge.url} refuses: {failure}", fix="Check its URL and model.")
    raise ApiUnavailableError(
        f"the judge at {judge.url} gave no answer in {ATTEMPTS} attempts: {failure}",
        fix="Check the address, then start again: labels so far are kept.",
    )


def _content(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["choices"][0]["message"]["content"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise InvalidInputError(
            f"{answer.url} does not answer like an OpenAI-compatible endpoint", fix="Give a base URL that ends in /v1."
        ) from None


def _read_parts(content: str) -> list[str] | None:
    """What the judge lists, also from within a code fence; None where there is no such list."""
    start, end = content.find("{"), content.rfind("}")
    try:
        parts = json.loads(content[start : end + 1])["unsupported"]
    except (ValueError, KeyError, TypeError):
        return None
    return parts if isinstance(parts, list) and all(isinstance(part, str) for part in parts) else None


def _find(part: str, summary: str) -> Characters | None:
    wanted = part.strip()
    start = summary.find(wanted)
    if start < 0:
        start = summary.lower().find(wanted.lower())
    return (start, start + len(wanted)) if wanted and start >= 0 and start + len(wanted) <= len(summary) else None
