"""The directory that results are written to."""

import tempfile
from pathlib import Path

from services.contract.errors import InvalidInputError


def make_folder(out: Path) -> None:
    """``out``, with the folders above it, before anything is computed for it.

    InvalidInputError where it can be no directory, or none to write to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise InvalidInputError(f"{out} can be no directory: {error.strerror}", fix="Name another --out.") from None
