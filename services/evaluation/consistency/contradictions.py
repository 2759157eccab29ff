"""Contradictions made from faithful texts: swapped names, numbers, dates, roles, negations, opposites, foreign phrases.

Each corruption takes a sentence that its document supports and returns it changed, with the changed character range.
All randomness comes from the generator that is passed in.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.evaluation.consistency.text import STOP_WORDS, read_words

MONTHS = "January February March April May June July August September October November December".split()  # noqa: SIM905
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()  # noqa: SIM905
OPPOSITES = dict(
    pair
    for line in """
    increase/decrease increased/decreased increases/decreases rise/fall rose/fell rises/falls risen/fallen won/lost
    win/lose wins/loses before/after more/less most/least first/last early/late earlier/later high/low higher/lower
    highest/lowest large/small larger/smaller largest/smallest old/young older/younger oldest/youngest north/south
    northern/southern east/west eastern/western accepted/rejected approved/refused allowed/banned began/ended
    started/stopped opened/closed bought/sold gained/lost arrived/left joined/left above/below over/under best/worst
    better/worse good/bad many/few all/none always/never often/rarely success/failure successful/unsuccessful
    supported/opposed support/oppose agreed/refused praised/criticised confirmed/denied guilty/innocent alive/dead
    born/killed man/woman men/women boy/girl father/mother son/daughter brother/sister husband/wife he/she his/her
    with/without inside/outside up/down ahead/behind safe/dangerous public/private major/minor long/short
    longer/shorter cheap/expensive strong/weak stronger/weaker
    """.split()  # noqa: SIM905
    for one, other in [line.split("/")]
    for pair in ((one, other), (other, one))
)
_NAME = re.compile(r"(?:[A-Z][\w'’-]+|[A-Z]{2,})(?:\s+(?:(?:of|the|de|and)\s+)?[A-Z][\w'’-]+)*")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_DATE_WORD = re.compile(rf"\b(?:{'|'.join(MONTHS + DAYS)})\b")
_AUXILIARY = re.compile(
    r"\b(is|are|was|were|has|have|had|will|would|can|could|should|did|does|do|may|might)\b( not\b|n't\b)?", re.I
)
_SPELT = "two three four five six seven eight nine ten eleven twelve fifteen twenty thirty fifty".split()  # noqa: SIM905
_SPELT_NUMBER = re.compile(rf"\b(?:{'|'.join(_SPELT)})\b", re.I)


@dataclass(frozen=True, slots=True)
class Corrupted:
    """A sentence with its unsupported character ranges and what was done to it."""

    sentence: str
    spans: list[tuple[int, int]]
    kind: str


def corrupt(sentence: str, *, document: str, foreign: str, generator: random.Random) -> Corrupted | None:
    """``sentence`` made to contradict or exceed ``document``; None where no corruption fits.

    ``foreign`` is a sentence of another document, from which names and phrases may be taken.
    """
    kinds = list(CORRUPTIONS)
    generator.shuffle(kinds)
    for kind in kinds:
        change = CORRUPTIONS[kind](sentence, document, foreign, generator)
        if change is None:
            continue
        start, end, put = change
        changed = sentence[:start] + put + sentence[end:]
        if put.strip() and changed.lower() != sentence.lower() and changed.lower() not in document.lower():
            return Corrupted(changed, [(start, start + len(put))], kind)
    return None


Change = tuple[int, int, str]
"""Replace characters [start, end) by a text."""


def _swap_name(sentence: str, document: str, foreign: str, generator: random.Random) -> Change | None:
    return _replace_name(sentence, _names(document), generator)


def _foreign_name(sentence: str, document: str, foreign: str, generator: random.Random) -> Change | None:
    return _replace_name(sentence, [name for name in _names(foreign) if name not in document], generator)


def _replace_name(sentence: str, names: Sequence[str], generator: random.Random) -> Change | None:
    own = [match for match in _NAME.finditer(sentence) if match.group().lower() not in STOP_WORDS]
    own = [match for match in own if match.start() > 0 or " " in match.group()]
    if not own:
        return None
    match = generator.choice(own)
    others = [name for name in names if not set(name.lower().split()) & set(match.group().lower().split())]
    return (match.start(), match.end(), generator.choice(others)) if others else None


def _names(text: str) -> list[str]:
    """Names that stand inside a sentence, so that its first word is not taken for one."""
    found = [
        match.group()
        for match in _NAME.finditer(text)
        if match.start() and text[match.start() - 2 : match.start()] not in (". ", "\n")
    ]
    return sorted({name for name in found if name.lower() not in STOP_WORDS and len(name) > 2})


def _swap_number(sentence: str, document: str, foreign: str, generator: random.Random) -> Change | None:
    found = list(_NUMBER.finditer(sentence)) + list(_SPELT_NUMBER.finditer(sentence))
    if not found:
        return None
    match = generator.choice(found)
    if not match.group()[0].isdigit():
        return match.start(), match.end(), generator.choice([word for word in _SPELT if word != match.group().lower()])
    others = [
        number
        for number in dict.fromkeys(_NUMBER.findall(document))
        if len(number) == len(match.group()) and number != match.group()
    ]
    if others and generator.random() < 0.5:
        return match.start(), match.end(), generator.choice(others)
    digits = [index for index, sign in enumerate(match.group()) if sign.isdigit()]
    position = generator.choice(digits[-2:])
    digit = generator.choice([sign for sign in "123456789" if sign != match.group()[position]])
    return match.start(), match.end(), match.group()[:position] + digit + match.group()[position + 1 :]


def _swap_date(sentence: str, document: str, foreign: str, generator: random.Random) -> Change | None:
    found = list(_DATE_WORD.finditer(sentence))
    if not found:
        return None
    match = generator.choice(found)
    family = MONTHS if match.group() in MONTHS else DAYS
    return match.start(), match.end(), generator.choice([word for word in family if word != match.group()])


def _negate(sentence: str, document: str, foreign: str, generator: random.Random) -> Change | None:
    found = list(_AUXILIARY.finditer(sentence))
    if not found:
        return None
    match = generator.choice(found)
    return match.start(), match.end(), match.group(1) if match.group(2) else f"{match.group(1)} not"


def _oppose(sentence: str, document: str, foreign: str, generator: random.Random) -> Change | None:
    found = [word for word in read_words(sentence) if word.text.lower() in OPPOSITES]
    if not found:
        return None
    word = generator.choice(found)
    put = OPPOSITES[word.text.lower()]
    return word.start, word.end, put.capitalize() if word.is_capitalised else put


def _exchange_roles(sentence: str, document: str, foreign: str, generator: random.Random) -> Change | None:
    found = [match for match in _NAME.finditer(sentence) if match.group().lower() not in STOP_WORDS]
    if len(found) < 2:
        return None
    first, second = sorted(generator.sample(found, 2), key=lambda match: match.start())
    return first.start(), second.end(), second.group() + sentence[first.end() : second.start()] + first.group()


def _foreign_tail(sentence: str, document: str, foreign: str, generator: random.Random) -> Change | None:
    """The end of the sentence taken from another document, cut before a function word in both."""
    here, there = _joints(sentence), _joints(foreign)
    if not here or not there:
        return None
    cut, borrowed = generator.choice(here), foreign[generator.choice(there) :]
    return cut, len(sentence), borrowed.rstrip()


def _foreign_phrase(sentence: str, document: str, foreign: str, generator: random.Random) -> Change | None:
    """Two or three content words replaced by as many of another document."""
    words = read_words(sentence)
    others = [
        word for word in read_words(foreign) if not word.is_stop_word and word.text.lower() not in document.lower()
    ]
    content = [word for word in words[1:] if not word.is_stop_word]
    if not content or not others:
        return None
    word = generator.choice(content)
    other = generator.choice(others).text
    return word.start, word.end, other.lower() if not word.is_capitalised else other


def _other_word(sentence: str, document: str, foreign: str, generator: random.Random) -> Change | None:
    """A content word replaced by another of the same document: a twisted statement in the document's own words."""
    words = [
        word
        for word in read_words(sentence)[1:]
        if not word.is_stop_word and not word.is_capitalised and not word.is_number
    ]
    others = [
        word
        for word in read_words(document)
        if not word.is_stop_word and not word.is_capitalised and not word.is_number
    ]
    if not words or not others:
        return None
    word = generator.choice(words)
    alike = [other.text for other in others if other.text[-2:] == word.text[-2:] and other.key != word.key]
    return (word.start, word.end, generator.choice(alike)) if alike else None


def _joints(sentence: str) -> list[int]:
    """Where a phrase begins with a preposition or a conjunction, not among the first three words."""
    starts = {
        "in",
        "on",
        "at",
        "by",
        "for",
        "from",
        "with",
        "after",
        "before",
        "to",
        "as",
        "because",
        "and",
        "over",
        "against",
        "during",
        "following",
    }
    words = read_words(sentence)
    return [word.start for word in words[3:-1] if word.text in starts]


CORRUPTIONS: dict[str, Callable[[str, str, str, random.Random], Change | None]] = {
    "swapped name": _swap_name,
    "foreign name": _foreign_name,
    "number": _swap_number,
    "date": _swap_date,
    "negation": _negate,
    "opposite": _oppose,
    "exchanged roles": _exchange_roles,
    "foreign tail": _foreign_tail,
    "foreign word": _foreign_phrase,
    "other word": _other_word,
}
