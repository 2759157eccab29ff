"""Which names, numbers and content words of an output its source does not contain: a check without any model.

It finds what was added, not what was twisted: a false claim put together from the source's own words passes.
Stop words, inflection and number words are English; other languages are compared word for word.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from services.contract.records import Span
from services.evaluation.reading import Token, read_tokens
from services.evaluation.words import NAME_LINKS, SELF_REFERENCE, plain_form

DETECTOR = "support"
# How often people agreed: of the words and numbers marked in XSumFaith, the share its annotators hold to be
# hallucinated; of the DeFacto summaries with a marked name, the share that has an error.
SCORES = {"number": 0.9, "entity": 0.9, "word": 0.7}
# A name or a number carries a fact; of the words around it only some do.
WEIGHTS = {"number": 2, "entity": 2, "word": 1}


@dataclass(frozen=True, kw_only=True)
class Support:
    """``share``, 0 to 100, of the output that the source supports; None with the reason in ``missing``.

    ``checked`` counts the names, numbers and content words looked up.
    """

    share: float | None
    missing: str | None
    checked: int
    spans: list[Span]


def check_support(output: str, *, source: str) -> Support:
    """Looks up every name, number and content word of ``output`` in ``source``.

    Words count as supported in any inflection, numbers in any spelling or rounded from a number of the source. In the
    share a name's word and a number weigh two, another word one.
    """
    found = _Source.read(source)
    items = [item for item in _items(read_tokens(output)) if item.kind]
    if not items:
        missing = "the output is empty" if not output.strip() else "the output has no name, number or content word"
        return Support(share=None, missing=missing, checked=0, spans=[])
    unsupported = [item for item in items if not found.supports(item.token)]
    total = sum(WEIGHTS[item.kind] for item in items)
    share = 100 * (1 - sum(WEIGHTS[item.kind] for item in unsupported) / total)
    spans = [_span(run, output, found) for run in _runs(unsupported, output)]
    return Support(share=share, missing=None, checked=len(items), spans=spans)


@dataclass(frozen=True, kw_only=True)
class _Item:
    """``kind``: number, entity, word; empty where there is nothing to look up."""

    token: Token
    kind: str


def _items(tokens: Sequence[Token]) -> list[_Item]:
    items = [_Item(token=token, kind=_kind(token)) for token in tokens]
    if not _capitals_mean_names(items):
        return [replace(item, kind="word") if item.kind == "entity" else item for item in items]
    for index, item in enumerate(items[:-1]):
        # A capital at the start of a sentence is a name's if a name goes on after it.
        if item.kind == "word" and item.token.is_capitalised and items[index + 1].kind == "entity":
            items[index] = replace(item, kind="entity")
    return items


def _kind(token: Token) -> str:
    if token.value is not None:
        return "number"
    if token.is_stop_word or plain_form(token.text) in SELF_REFERENCE:
        return ""
    return "entity" if token.is_capitalised and not token.starts_sentence else "word"


def _capitals_mean_names(items: Sequence[_Item]) -> bool:
    """Not so in a headline or in a text all in capitals."""
    inner = [item.kind for item in items if item.kind in ("entity", "word") and not item.token.starts_sentence]
    return len(inner) < 4 or inner.count("entity") <= 0.7 * len(inner)


@dataclass(frozen=True, kw_only=True)
class _Source:
    keys: frozenset[str]
    numbers: frozenset[Decimal]
    percentages: frozenset[Decimal]
    names: dict[str, str]

    @classmethod
    def read(cls, text: str) -> "_Source":
        tokens = read_tokens(text)
        values = [token for token in tokens if token.value is not None]
        return cls(
            keys=frozenset(token.key for token in tokens if token.value is None),
            numbers=frozenset(token.value for token in values if token.value is not None),
            percentages=frozenset(token.value for token in values if token.value is not None and token.percent),
            names={item.token.text.lower(): item.token.text for item in _items(tokens) if item.kind == "entity"},
        )

    def supports(self, token: Token) -> bool:
        if token.value is None:
            return token.key in self.keys
        candidates = self.percentages if token.percent else self.numbers
        return token.value in candidates or any(_is_rounding(token.value, exact) for exact in candidates)


def _is_rounding(value: Decimal, exact: Decimal) -> bool:
    """Whether ``value`` is ``exact`` given to fewer digits, but to two or more: 186,000 for 186,432."""
    digits = value.normalize().as_tuple()
    if len(digits.digits) < 2 or not isinstance(digits.exponent, int):
        return False
    return 2 * abs(exact - value) <= Decimal((0, (1,), digits.exponent))


def _runs(unsupported: Sequence[_Item], output: str) -> list[list[_Item]]:
    """Neighbours of one kind, which are shown as one span; a name also runs over words such as "of the"."""
    runs: list[list[_Item]] = []
    for item in unsupported:
        if runs and item.kind == runs[-1][-1].kind and _belongs(runs[-1][-1], item, output):
            runs[-1].append(item)
        else:
            runs.append([item])
    return runs


def _belongs(left: _Item, right: _Item, output: str) -> bool:
    gap = output[left.token.end : right.token.start]
    if left.kind == "number":
        return False
    links = NAME_LINKS if left.kind == "entity" else frozenset[str]()
    return not gap.strip(" -\u00a0\u2010\u2011") or (
        gap.startswith(" ") and gap.endswith(" ") and set(gap.split()) <= links
    )


def _span(run: Sequence[_Item], output: str, found: _Source) -> Span:
    start, end = run[0].token.start, run[-1].token.end
    kind = run[0].kind
    text = output[start:end]
    explain = {"number": _explain_number, "entity": _explain_name, "word": _explain_word}[kind]
    return Span(
        start=start,
        end=end,
        detector=DETECTOR,
        kind=kind,
        score=SCORES[kind],
        explanation=explain(text, run[0].token, found),
    )


def _explain_number(text: str, token: Token, found: _Source) -> str:
    assert token.value is not None
    value = token.value
    candidates = found.percentages if token.percent else found.numbers
    if not candidates:
        return f'the article has no "{text}"; it gives no {"percentage" if token.percent else "number"} at all'
    nearest = sorted(candidates, key=lambda number: (abs(number - value), number))[:3]
    sign = " %" if token.percent else ""
    return f'the article has no "{text}"; the nearest it gives: {", ".join(f"{_plain(n)}{sign}" for n in nearest)}'


def _explain_name(text: str, token: Token, found: _Source) -> str:
    close = difflib.get_close_matches(text.lower(), found.names, n=1, cutoff=0.7)
    hint = f'; the nearest name there is "{found.names[close[0]]}"' if close else "; no name there comes near it"
    return f'the article has no "{text}"{hint}'


def _explain_word(text: str, token: Token, found: _Source) -> str:
    if " " in text:
        return f'the article has none of the words "{text}", in any form'
    return f'the article has no "{text}", in any form of the word'


def _plain(number: Decimal) -> str:
    return f"{number:,f}".rstrip("0").rstrip(".") if number % 1 else f"{number:,.0f}"
