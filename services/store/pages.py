"""Cursors: opaque places in a list, from which its next page starts."""

import base64
import binascii
import json

from services.contract.errors import InvalidInputError

MAX_LIMIT = 1000


def encode_cursor(*place: str | int) -> str:
    """A cursor that stands for the sort key of the last item of a page."""
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode().rstrip("=")


def decode_cursor(cursor: str, *kinds: type) -> list[str | int]:
    """The sort key in a cursor, whose parts must be of ``kinds``; InvalidInputError for any other text."""
    try:
        place = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (ValueError, binascii.Error):
        place = None
    if not isinstance(place, list) or [type(part) for part in place] != list(kinds):
        raise InvalidInputError(
            f"{cursor!r} is not a cursor of this list", fix="Pass next_cursor of the page before, unchanged."
        )
    return place


def check_limit(limit: int) -> None:
    """InvalidInputError unless a page of ``limit`` items may be asked for."""
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidInputError(f"limit {limit} is not between 1 and {MAX_LIMIT}", fix="Ask for several pages.")
