"""Lenses that come with the project, by the short names of their models."""

from pathlib import Path

_DATA = Path(__file__).with_name("data")

SHIPPED = {"smollm2-135m-instruct": _DATA / "smollm2-135m-instruct.json"}
"""A name here means the shipped lens, whatever else is called so where a command runs."""
