"""Text as words and sentences with character offsets, the way the consistency model reads it.

The shipped weights were trained on exactly these words and keys: a change here asks for new training.
"""

import functools
import itertools
import re
import unicodedata
from dataclasses import dataclass

from nltk.stem.porter import PorterStemmer

LONGEST_SENTENCE = 60
"""Words; a longer one, from text without punctuation, is read in pieces."""

STOP_WORDS = frozenset(
    """
    a about after all also an and any are as at be because been before being between both but by can could did do
    does during each for from had has have he her hers him his how i if in into is it its itself just may me might
    more most my no nor not of off on once only or other our out over own said say says she should so some such than
    that the their them then there these they this those through to too under until up was we were what when where
    which while who whom why will with would you your 's n't
    """.split()  # noqa: SIM905
)
NUMBER_WORDS = {
    word: str(value)
    for value, word in enumerate(
        """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
        seventeen eighteen nineteen twenty""".split()  # noqa: SIM905
    )
}

_WORD = re.compile(r"\d+(?:[.,:]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)*|[^\W_]+")
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*\s+(?=\S)|\n+")
_ABBREVIATION = re.compile(
    r"(?:\b(?:mr|mrs|ms|dr|st|prof|rev|gen|sgt|lt|no|vs|jan|feb|aug|sept|oct|nov|dec)|\b\w)\.\s+$", re.I
)


@dataclass(frozen=True, slots=True)
class Word:
    """Characters [start, end) of a text; ``key`` is shared by a word's inflections and by a number's spellings."""

    start: int
    end: int
    text: str
    key: str

    @property
    def is_stop_word(self) -> bool:
        return self.text.lower() in STOP_WORDS

    @property
    def is_number(self) -> bool:
        return self.key[0].isdigit()

    @property
    def is_capitalised(self) -> bool:
        return self.text[0].isupper()


def read_words(text: str) -> list[Word]:
    return [Word(match.start(), match.end(), match.group(), word_key(match.group())) for match in _WORD.finditer(text)]


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Character ranges of the sentences, without surrounding space; none is longer than LONGEST_SENTENCE words."""
    ranges = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        if "\n" not in match.group() and _ABBREVIATION.search(text, max(start, match.start() - 6), match.end()):
            continue
        ranges.append((start, match.end()))
        start = match.end()
    ranges.append((start, len(text)))
    return [part for first, last in ranges for part in _pieces(text, first, last)]


@functools.lru_cache(maxsize=100_000)
def word_key(word: str) -> str:
    plain = unicodedata.normalize("NFKC", word).casefold().replace("’", "'").removesuffix("'s")
    if plain[:1].isdigit():
        return plain.replace(",", "")
    return NUMBER_WORDS.get(plain) or str(_STEMMER.stem(plain)) or word


def _pieces(text: str, start: int, end: int) -> list[tuple[int, int]]:
    words = list(_WORD.finditer(text, start, end))
    if not words:
        return []
    cuts = [start, *(words[index].start() for index in range(LONGEST_SENTENCE, len(words), LONGEST_SENTENCE)), end]
    pieces = []
    for first, last in itertools.pairwise(cuts):
        inside = text[first:last]
        pieces.append((first + len(inside) - len(inside.lstrip()), last - len(inside) + len(inside.rstrip())))
    return pieces


_STEMMER = PorterStemmer()
