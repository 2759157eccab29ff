"""chrF and METEOR, the overlap of an output with its reference in characters and in words."""

import functools
from collections.abc import Sequence
from typing import Any

from nltk.stem.porter import PorterStemmer
from nltk.tokenize import NLTKWordTokenizer
from nltk.translate.meteor_score import single_meteor_score
from sacrebleu.metrics.chrf import CHRF

from services.contract.errors import DatasetError


def chrf(output: str, *, reference: str) -> float:
    """chrF, 0 to 100: F2 over n-grams of up to six characters (Popović 2015), by sacrebleu's defaults."""
    return float(_CHRF.sentence_score(output, [reference]).score)


def meteor(output: str, *, reference: str) -> float:
    """METEOR, 0 to 100 (Banerjee and Lavie 2005), by NLTK: words match exactly, by stem, or as WordNet's synonyms.

    DatasetError where WordNet is not installed.
    """
    return _meteor(output, reference, wordnet=_wordnet())


def meteor_exact_stem(output: str, *, reference: str) -> float:
    """METEOR without its stage of synonyms, which needs no WordNet; mostly lower than METEOR."""
    return _meteor(output, reference, wordnet=_NoSynonyms())


class _NoSynonyms:
    def synsets(self, _word: str) -> Sequence[Any]:
        return ()


def _meteor(output: str, reference: str, *, wordnet: Any) -> float:
    tokens = [_TOKENIZER.tokenize(text) for text in (reference, output)]
    return 100 * float(single_meteor_score(*tokens, stemmer=_STEMMER, wordnet=wordnet))


@functools.cache
def _wordnet() -> Any:
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:
        raise DatasetError(
            "METEOR's synonyms need WordNet, which is not installed",
            fix="Run python -m nltk.downloader wordnet, or use the metric meteor_exact_stem.",
        ) from None
    return wordnet


_CHRF = CHRF()
_STEMMER = PorterStemmer()
_TOKENIZER = NLTKWordTokenizer()
