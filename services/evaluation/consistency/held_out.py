"""Scores of labelled outputs by networks that have not seen their documents, in a file without any text."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from services.contract.errors import InvalidInputError

FILE = "held_out.json"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a detector says of the example ``key``: the output's score, None where it has none, and scored ranges."""

    key: str
    score: float | None
    ranges: list[tuple[int, int, float]]


def write_held_out(folder: Path, judgements: Sequence[Judgement]) -> None:
    rows = [asdict(judgement) for judgement in judgements]
    (folder / FILE).write_text(json.dumps(rows, separators=(",", ":")) + "\n", encoding="utf-8")


def read_held_out(folder: Path) -> dict[str, Judgement]:
    """By key. InvalidInputError where training left no such file."""
    try:
        rows = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return {
            row["key"]: Judgement(
                key=row["key"], score=row["score"], ranges=[(start, end, score) for start, end, score in row["ranges"]]
            )
            for row in rows
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(
            f"{folder / FILE} cannot be read: {error}",
            fix="Run python -m services.evaluation.consistency.train, and name its --out folder.",
        ) from None
