"""Text as tokens with character offsets: words, numbers with their values, and where sentences begin."""

from dataclasses import dataclass, replace
from decimal import Decimal

import regex

from services.evaluation.words import (
    ORDINALS,
    SCALES,
    SHORT_SCALES,
    STOP_WORDS,
    TENS,
    TITLES,
    UNITS,
    plain_form,
    word_key,
)

_LETTERS = r"(?!\p{Han})\p{L}(?:(?!\p{Han})[\p{L}\p{M}])*"
_TOKEN = regex.compile(
    rf"""
    (?P<number>[$£€¥]?(?P<digits>\d{{1,3}}(?:[,\u00a0\u2009\u202f]\d{{3}})+(?!\d)(?:\.\d+)?|\d+(?:[.:]\d+)?)(?P<unit>{_LETTERS})?)
    |(?P<acronym>(?:\p{{Lu}}\.){{2,}})
    |(?P<code>\p{{Latin}}+\d[\p{{Latin}}\d]*)
    |(?P<han>\p{{Han}})
    |(?P<word>{_LETTERS}(?:['’]{_LETTERS})*)
    """,
    regex.VERBOSE,
)
_PERCENT = regex.compile(r"[\s-]?(?:%|per\s?cent\b|pc\b)", regex.IGNORECASE)
_SENTENCE_START = regex.compile(r"[.!?…:\n]|[\"“‘«]$")
_WITHIN_NUMBER = regex.compile(r"\s?[\u2010\u2011-]\s?|\s")


@dataclass(frozen=True, kw_only=True)
class Token:
    """Characters [start, end) of a text. ``key`` is what tokens are compared by; a number also has its ``value``."""

    start: int
    end: int
    text: str
    key: str
    value: Decimal | None = None
    percent: bool = False
    starts_sentence: bool = False

    @property
    def is_capitalised(self) -> bool:
        return self.text[0].isupper() or self.text[0].istitle()

    @property
    def is_stop_word(self) -> bool:
        return self.key in STOP_WORDS


def read_tokens(text: str) -> list[Token]:
    """The words and numbers of a text in order: "1,200", "twelve", "1.5 million", "3rd" and "12 per cent" are numbers.

    Words of any script are read; number words, stop words and inflection are English.
    """
    tokens = _split(text)
    joined = []
    index = 0
    while index < len(tokens):
        number = _read_number(tokens, index, text)
        if number is None:
            joined.append(tokens[index])
            index += 1
        else:
            token, index = number
            joined.append(token)
    return joined


def _split(text: str) -> list[Token]:
    tokens: list[Token] = []
    for match in _TOKEN.finditer(text):
        word = match.group()
        starts_sentence = _starts_sentence(tokens, text, match.start())
        if match["number"]:
            key, value = plain_form(word), _value(match)
        else:
            key, value = _word_key(word.replace(".", ""), starts_sentence=starts_sentence), None
        tokens.append(
            Token(
                start=match.start(), end=match.end(), text=word, key=key, value=value, starts_sentence=starts_sentence
            )
        )
    return tokens


def _word_key(word: str, *, starts_sentence: bool) -> str:
    plain = plain_form(word)
    if plain not in STOP_WORDS:
        return word_key(word)
    # "US", "WHO" and "May" are names; "us", "who" and "may" are not.
    is_name = (len(word) > 1 and word.isupper()) or (word == "May" and not starts_sentence)
    return word if is_name else plain


def _value(match: "regex.Match[str]") -> Decimal:
    # A time of day reads like a decimal, so that 11:30 equals 11.30 and 11:00 equals 11.
    value = Decimal(regex.sub(r"[,\s]", "", match["digits"]).replace(":", "."))
    return value * SHORT_SCALES.get(plain_form(match["unit"] or ""), 1)


def _starts_sentence(before: list[Token], text: str, start: int) -> bool:
    if not before:
        return True
    last = before[-1]
    gap = text[last.end : start]
    if gap.startswith(".") and (plain_form(last.text) in TITLES or len(last.text) == 1):
        return False
    return bool(_SENTENCE_START.search(gap))


def _read_number(tokens: list[Token], index: int, text: str) -> tuple[Token, int] | None:
    """The number that begins at ``tokens[index]`` as one token, and the index after it."""
    first = tokens[index]
    if first.value is not None:
        value, after = first.value, index + 1
        while after < len(tokens) and _adjoins(tokens, after, text) and plain_form(tokens[after].text) in SCALES:
            value *= SCALES[plain_form(tokens[after].text)]
            after += 1
    else:
        value, after = _read_number_words(tokens, index, text)
        # "one" alone is mostly a pronoun.
        if after == index or (after == index + 1 and plain_form(first.text) == "one"):
            return None
    end = tokens[after - 1].end
    percent = _PERCENT.match(text, end)
    if percent:
        end = percent.end()
        while after < len(tokens) and tokens[after].start < end:
            after += 1
    number = replace(first, end=end, text=text[first.start : end], value=value, percent=percent is not None)
    return number, after


def _read_number_words(tokens: list[Token], index: int, text: str) -> tuple[Decimal, int]:
    total, current, last = 0, 0, ""
    after = index
    while after < len(tokens) and (after == index or _adjoins(tokens, after, text)):
        word = plain_form(tokens[after].text)
        if word == "and" and last in ("hundred", "scale") and _continues(tokens, after + 1, text):
            after += 1
            continue
        small = UNITS.get(word, ORDINALS.get(word, 0))
        if (word in UNITS or small) and (last in ("", "hundred", "scale") or (last == "tens" and 0 < small < 10)):
            current, last = current + small, "units"
        elif word in TENS and last in ("", "hundred", "scale"):
            current, last = current + TENS[word], "tens"
        elif word == "hundred" and last in ("", "units", "tens"):
            current, last = 100 * (current or 1), "hundred"
        elif word in SCALES and last != "scale":
            total, current, last = total + SCALES[word] * (current or 1), 0, "scale"
        else:
            break
        after += 1
        if word in ORDINALS:
            break
    return Decimal(total + current), after


def _continues(tokens: list[Token], index: int, text: str) -> bool:
    if index >= len(tokens) or not _adjoins(tokens, index, text):
        return False
    word = plain_form(tokens[index].text)
    return word in UNITS or word in TENS or word in ORDINALS


def _adjoins(tokens: list[Token], index: int, text: str) -> bool:
    return _WITHIN_NUMBER.fullmatch(text, tokens[index - 1].end, tokens[index].start) is not None
