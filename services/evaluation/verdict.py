"""What a metric says of one answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from services.contract.records import Span


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """``score``, 0 to 100, higher is better; None where there is nothing to judge, or for the reason ``missing``.

    ``spans`` hold what is wrong.
    """

    score: float | None
    spans: Sequence[Span] = ()
    missing: str | None = None
