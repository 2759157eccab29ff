"""Colours of methods: of middle lightness, so that they read on light and dark pages alike."""

from collections.abc import Iterable

BASELINE = "#d97706"
"""SFT: the warm colour that every other method is compared with."""

DISTILLED = ("#0d9488", "#3b82f6", "#8b5cf6", "#db2777", "#65a30d", "#0891b2", "#6366f1", "#be4b49")
"""KD methods in table order, then around again."""


def method_colours(methods: Iterable[str]) -> dict[str, str]:
    """A colour per method, as #rrggbb; SFT has BASELINE, the others follow in the order given."""
    distilled = [method for method in dict.fromkeys(methods) if method != "SFT"]
    colours = {method: DISTILLED[index % len(DISTILLED)] for index, method in enumerate(distilled)}
    return {"SFT": BASELINE, **colours}
