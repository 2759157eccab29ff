"""A text whose words a person marks with mouse, finger or keyboard."""

from collections.abc import Collection, Mapping
from pathlib import Path

import streamlit as st

from services.reports.annotation import words_of

FOLDER = Path(__file__).parent


def mark_words(text: str, *, key: str, marked: Collection[int], hints: Mapping[int, str]) -> list[int]:
    """The places of the marked words, at first ``marked``; ``key`` stands for this text and whoever marks it.

    ``hints`` tell by place what a detector says of a word; it is underlined.
    """
    # Registering the same component again changes nothing; a first visit, or a test's, needs it.
    component = st.components.v2.component(
        "smoothkd.marking",
        css=(FOLDER / "marking.css").read_text(encoding="utf-8"),
        js=(FOLDER / "marking.js").read_text(encoding="utf-8"),
    )
    first = sorted(marked)
    result = component(
        key=key,
        data={"id": key, "pieces": pieces(text, hints=hints), "marked": first},
        default={"marked": first},
        on_marked_change=lambda: None,
    )
    found = result.get("marked")
    return first if found is None else [int(place) for place in found]


def pieces(text: str, *, hints: Mapping[int, str]) -> list[tuple[str, str, bool]]:
    """(text, hint, whether it is a word): words and what stands between them; joined again they are the text."""
    found: list[tuple[str, str, bool]] = []
    end = 0
    for place, (start, word_end) in enumerate(words_of(text)):
        if start > end:
            found.append((text[end:start], "", False))
        found.append((text[start:word_end], hints.get(place, ""), True))
        end = word_end
    if end < len(text):
        found.append((text[end:], "", False))
    return found
