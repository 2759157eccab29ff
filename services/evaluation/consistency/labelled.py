"""Human labels of summaries as training examples: XSumFaith, DeFacto, BUMP; and SummEval for validation alone.

The files are those of a data folder with one folder per set, as ``train`` documents. Every example carries the group
of its document: documents that share text share a group, whichever set they come from, so that folds by group never
train on a document that they test.
"""

import difflib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from services.contract.errors import DatasetError

_SHINGLE = 8
_SAME_DOCUMENT = 6
"""Shared runs of _SHINGLE words from which on two documents count as one; chance agreement shares none or two."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """An output and what people, or its maker, hold to be wrong in it.

    ``spans``: unsupported character ranges; None where only the whole output is labelled. ``unsupported``: the label
    of the output, None where there is none. ``units``: character ranges that were labelled one by one.
    """

    origin: str
    key: str
    document: str
    output: str
    unsupported: bool | None
    spans: list[tuple[int, int]] | None
    units: list[tuple[int, int]] | None = None
    rating: float | None = None
    group: int = -1


def read_labelled(folder: Path) -> list[Example]:
    """All examples under ``folder``, grouped by document. DatasetError names the file that cannot be read."""
    examples = [*_xsumfaith(folder), *_defacto(folder), *_bump(folder), *_summeval(folder)]
    groups = group_documents([example.document for example in examples])
    return [replace(example, group=group) for example, group in zip(examples, groups, strict=True)]


def group_documents(documents: Iterable[str]) -> list[int]:
    """One number per document; the same for documents that share text beyond chance."""
    documents = list(documents)
    distinct = {document: index for index, document in enumerate(dict.fromkeys(documents))}
    parents = list(range(len(distinct)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for document, index in distinct.items():
        words = re.findall(r"\w+", document.lower())
        # Every text is cut where its words say so, not by position, so that a changed beginning changes little.
        for shingle in {tuple(words[start : start + _SHINGLE]) for start in range(len(words) - _SHINGLE + 1)}:
            if sum(map(len, shingle)) % 4 == 0:
                holders[shingle].append(index)
    shared = Counter(
        (one, other)
        for found in holders.values()
        if 1 < len(found) < 10
        for one in found
        for other in found
        if one < other
    )
    for (one, other), count in shared.items():
        if count >= _SAME_DOCUMENT:
            parents[root(other)] = root(one)
    return [root(distinct[document]) for document in documents]


def changed_spans(before: str, after: str) -> list[tuple[int, int]]:
    """Character ranges of the words of ``after`` that an edit put in; next to the gap where it only took out."""
    old, new = _words(before), _words(after)
    matcher = difflib.SequenceMatcher(
        None, [w.lower() for w, _, _ in old], [w.lower() for w, _, _ in new], autojunk=False
    )
    spans = []
    for kind, _, _, first, last in matcher.get_opcodes():
        if kind == "equal" or not new:
            continue
        if first == last:
            first, last = max(first - 1, 0), min(first + 1, len(new))
        spans.append((new[first][1], new[last - 1][2]))
    return spans


def _xsumfaith(folder: Path) -> list[Example]:
    documents = {row["bbcid"]: row["document"] for row in _rows(folder / "xsum_hallucination" / "documents.jsonl")}
    examples = []
    for number, row in enumerate(_rows(folder / "xsum_hallucination" / "spans.jsonl")):
        units, end = [], 0
        for token in row["tokens"]:
            start = row["summary"].index(token, end)
            end = start + len(token)
            units.append((start, end))
        spans = [unit for unit, label in zip(units, row["token_hallucinated"], strict=True) if label]
        examples.append(
            Example(
                origin="xsumfaith",
                key=f"xsumfaith-{number}",
                document=documents[row["bbcid"]],
                output=row["summary"],
                unsupported=bool(spans),
                spans=spans,
                units=units,
            )
        )
    return examples


def _defacto(folder: Path) -> list[Example]:
    """Candidates with their label, and people's corrections of the wrong ones as outputs without errors."""
    examples = []
    for number, row in enumerate(_rows(folder / "defacto" / "xsum.jsonl")):
        wrong = bool(row["has_error"])
        corrected = (row["feedback"] or {}).get("summary") or ""
        spans: list[tuple[int, int]] | None = []
        if wrong:
            spans = changed_spans(corrected, row["candidate"]) or None if corrected else None
        made = Example(
            origin="defacto",
            key=f"defacto-{number}",
            document=row["article"],
            output=row["candidate"],
            unsupported=wrong,
            spans=spans,
        )
        examples.append(made)
        if wrong and corrected and spans:
            examples.append(
                replace(
                    made, origin="defacto-corrected", key=f"{made.key}-c", output=corrected, unsupported=False, spans=[]
                )
            )
    return examples


def _bump(folder: Path) -> list[Example]:
    """Edited summaries with what was edited, and each reference once as an output without errors."""
    articles = {str(row["id"]): row for row in _rows(folder / "cnn_dailymail" / "test.jsonl")}
    examples = []
    seen = set()
    for number, row in enumerate(_rows(folder / "bump" / "edits.jsonl")):
        article = articles[str(row["article_id"])]
        reference = article["highlights"]
        made = Example(
            origin="bump",
            key=f"bump-{number}",
            document=article["article"],
            output=row["edited_summary"],
            unsupported=True,
            spans=changed_spans(reference, row["edited_summary"]),
        )
        examples.append(made)
        if article["id"] not in seen:
            seen.add(article["id"])
            examples.append(
                replace(
                    made, origin="bump-reference", key=f"bump-r{number}", output=reference, unsupported=False, spans=[]
                )
            )
    return examples


def _summeval(folder: Path) -> list[Example]:
    articles = {row["id"]: row["article"] for row in _rows(folder / "cnn_dailymail" / "test_tokenised.jsonl")}
    return [
        Example(
            origin="summeval",
            key=f"summeval-{number}",
            document=articles[row["id"]],
            output=row["summary"],
            unsupported=None,
            spans=None,
            rating=float(row["consistency"]),
        )
        for number, row in enumerate(_rows(folder / "summeval" / "system_scores.jsonl"))
    ]


def _words(text: str) -> list[tuple[str, int, int]]:
    return [(match.group(), match.start(), match.end()) for match in re.finditer(r"\w+(?:['’.,:]\w+)*", text)]


def _rows(file: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{file} cannot be read: {error}", fix="Name a data folder that holds the sets under --data."
        ) from None
