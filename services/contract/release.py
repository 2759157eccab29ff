"""Which smoothkd this is, and which labels it sends and reads."""

import importlib.metadata

LABEL_FORMAT = 1
"""Raised when a student of the former release could not read what a teacher of this one sends, or read it wrongly."""


UNKNOWN_RELEASE = "unknown"
"""Of code that runs without being installed."""


def release() -> str:
    """The version that is installed, such as 0.1.0, or UNKNOWN_RELEASE."""
    try:
        return importlib.metadata.version("smoothkd")
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN_RELEASE
