"""A claim is one sentence of an output beside the passage of the source that supports it best, with lexical evidence.

Shapes: W words of the claim, F features.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.evaluation.consistency.text import Word, read_words, split_sentences

PASSAGE_WORDS = 100
FEATURES = (
    "absent",
    "absent_before",
    "absent_after",
    "pair_before_absent",
    "pair_after_absent",
    "triple_absent",
    "stop_word",
    "number",
    "capitalised",
    "rarity",
    "absent_share",
    "pairs_absent_share",
    "uncovered_by_one_sentence",
    "first_position",
    "sentences_apart",
    "apart_from_the_rest",
    "far_from_the_rest",
)


@dataclass(frozen=True, slots=True)
class Claim:
    """``index``, ``start``: which sentence of the output it is and where that begins; word offsets are relative to it.

    ``passage``: indices of the source's sentences that support it best, in order; ``nearest`` the best of them, as
    text, empty for a source without sentences.
    """

    index: int
    start: int
    passage: list[int]
    nearest: str
    words: list[Word]
    features_WF: npt.NDArray[np.float32]


class Source:
    """A document read once for all claims about it."""

    def __init__(self, document: str) -> None:
        ranges = split_sentences(document)
        self.sentences = [document[start:end] for start, end in ranges]
        self.words = [read_words(sentence) for sentence in self.sentences]
        self.keys = [[word.key for word in words] for words in self.words]
        self.counts = Counter(key for keys in self.keys for key in keys)
        self.spread = Counter(key for keys in self.keys for key in set(keys))
        self.pairs = {pair for keys in self.keys for pair in itertools.pairwise(keys)}
        self.triples = {triple for keys in self.keys for triple in zip(keys, keys[1:], keys[2:], strict=False)}
        self.where = _positions(self.keys)

    def rarity(self, key: str) -> float:
        """0 for a word of every sentence, about 1 for a word of one."""
        count = len(self.sentences)
        return math.log((count + 1) / (self.spread[key] + 1)) / math.log(count + 2)


def read_claims(output: str, *, source: Source) -> list[Claim]:
    """The claims of an output in order; none for an output without words."""
    claims = []
    for index, (start, end) in enumerate(split_sentences(output)):
        words = read_words(output[start:end])
        passage = _best_passage(words, source)
        nearest = source.sentences[passage[0]] if passage else ""
        claims.append(Claim(index, start, sorted(passage), nearest, words, _features(words, source)))
    return claims


def _best_passage(words: list[Word], source: Source) -> list[int]:
    """Source sentences that together cover the claim's words, weighted by rarity, the best first.

    Chosen greedily by what each adds; the document's first sentences fill what room is left, because they say
    what a document is about.
    """
    weights = {word.key: source.rarity(word.key) * (0.2 if word.is_stop_word else 1.0) + 0.01 for word in words}
    # In order of appearance, because the order of a set, and with it a sum's last digit, changes between processes.
    shared = [[key for key in dict.fromkeys(keys) if key in weights] for keys in source.keys]
    uncovered = dict(weights)
    chosen: list[int] = []
    room = PASSAGE_WORDS
    while True:
        gains = {
            index: sum(uncovered[key] for key in keys) + 0.1 * sum(weights[key] for key in keys)
            for index, keys in enumerate(shared)
            if index not in chosen and (len(source.keys[index]) <= room or not chosen)
        }
        best = max(gains, key=lambda index: (gains[index], -index), default=None)
        if best is None or gains[best] <= 0:
            break
        chosen.append(best)
        room -= len(source.keys[best])
        for key in shared[best]:
            uncovered[key] *= 0.3
    for index, keys in enumerate(source.keys):
        if index not in chosen and len(keys) <= room:
            chosen.append(index)
            room -= len(keys)
    return chosen


def _features(words: list[Word], source: Source) -> npt.NDArray[np.float32]:
    keys = [word.key for word in words]
    absent = [key not in source.counts for key in keys]
    pairs = [pair not in source.pairs for pair in itertools.pairwise(keys)]
    triples = [triple not in source.triples for triple in zip(keys, keys[1:], keys[2:], strict=False)]
    content = [index for index, word in enumerate(words) if not word.is_stop_word]
    absent_share = _share(absent[index] for index in content)
    pairs_share = _share(pairs)
    uncovered = _uncovered_by_best([keys[index] for index in content], source)
    apart, far = (_apart_from_the_rest([keys[index] for index in content], source, reach=reach) for reach in (0, 1))
    rows = []
    last = len(words) - 1
    for index, word in enumerate(words):
        around = [
            source.where[keys[near]] for near in (index - 1, index, index + 1) if 0 <= near <= last and not absent[near]
        ]
        rows.append(
            [
                absent[index],
                index > 0 and absent[index - 1],
                index < last and absent[index + 1],
                index > 0 and pairs[index - 1],
                index < last and pairs[index],
                any(triples[max(index - 2, 0) : index + 1]),
                word.is_stop_word,
                word.is_number,
                word.is_capitalised,
                source.rarity(keys[index]),
                absent_share,
                pairs_share,
                uncovered,
                1 - min(source.where.get(keys[index], [len(source.keys)])) / max(len(source.keys), 1),
                _apart(around),
                0 if word.is_stop_word else apart[keys[index]],
                0 if word.is_stop_word else far[keys[index]],
            ]
        )
    return np.array(rows, dtype=np.float32).reshape(len(words), len(FEATURES))


def _uncovered_by_best(keys: list[str], source: Source) -> float:
    wanted = set(keys)
    best = max((len(wanted & set(sentence)) for sentence in source.keys), default=0)
    return 1 - best / len(wanted) if wanted else 0.0


def _apart(places: list[list[int]]) -> float:
    """How far apart in the source neighbouring words of the claim stand: 0 in one sentence, 1 far apart or nowhere."""
    if len(places) < 2:
        return 1.0
    gaps = [min(abs(one - other) for one in first for other in second) for first, second in itertools.pairwise(places)]
    return min(max(gaps), 5) / 5


def _apart_from_the_rest(content: list[str], source: Source, *, reach: int) -> dict[str, float]:
    """For each of the claim's content words, how much less of the others is where it stands than at their best place.

    0 where the sentence that holds most of the others, by rarity, holds the word too; 1 where no sentence that holds it
    has any of the others: it belongs to another statement of the source. A sentence counts with ``reach`` neighbours on
    each side, because a statement may go on with a pronoun.
    """
    weights = {key: source.rarity(key) + 0.01 for key in dict.fromkeys(content)}
    around = np.arange(-reach, reach + 1)
    holds = {}
    covered = np.zeros(len(source.keys) + 2)
    for key, weight in weights.items():
        holds[key] = np.zeros(len(covered), dtype=bool)
        holds[key][np.add.outer(np.array(source.where.get(key, []), dtype=np.int64) + 1, around)] = True
        covered += weight * holds[key]
    return {key: _lacking(covered - weight * holds[key], holds[key]) for key, weight in weights.items()}


def _lacking(others: npt.NDArray[np.float64], holds: npt.NDArray[np.bool_]) -> float:
    most = float(others.max())
    if most < 1e-9:
        return 0.0
    return 1 - float(others[holds].max()) / most if holds.any() else 1.0


def _share(flags: Iterable[bool]) -> float:
    flags = list(flags)
    return sum(flags) / len(flags) if flags else 0.0


def _positions(keys: list[list[str]]) -> dict[str, list[int]]:
    where: dict[str, list[int]] = {}
    for index, sentence in enumerate(keys):
        for key in sentence:
            if not where.get(key) or where[key][-1] != index:
                where.setdefault(key, []).append(index)
    return where
