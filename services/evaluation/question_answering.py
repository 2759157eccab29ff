"""Short answers to questions about paragraphs, by exact match and F1 as HotpotQA's own evaluation computes them."""

import re
import string
from collections import Counter
from collections.abc import Sequence

from services.evaluation.answering import Answer
from services.evaluation.verdict import Verdict

INSTRUCTION = "Answer the question from the paragraphs below, with the answer alone and in as few words as possible.\n\nQuestion: {question}"  # noqa: E501
CLOSED = {"yes", "no", "noanswer"}


def judge_exact_match(answers: Sequence[Answer]) -> list[Verdict]:
    return [Verdict(score=100.0 * exact_match(one.output, reference=one.request.reference)) for one in answers]


def judge_answer_f1(answers: Sequence[Answer]) -> list[Verdict]:
    return [Verdict(score=100.0 * answer_f1(one.output, reference=one.request.reference)) for one in answers]


def exact_match(output: str, *, reference: str) -> bool:
    """Whether the output's first line is the reference, case, punctuation and articles apart."""
    return _words(_first_line(output)) == _words(reference)


def answer_f1(output: str, *, reference: str) -> float:
    """F1 of the words that the output's first line and the reference share, 0 to 1; yes and no count as a whole."""
    given, right = _words(_first_line(output)), _words(reference)
    if (" ".join(given) in CLOSED or " ".join(right) in CLOSED) and given != right:
        return 0.0
    shared = sum((Counter(given) & Counter(right)).values())
    return 2 * shared / (len(given) + len(right)) if shared else 0.0


def _first_line(output: str) -> str:
    return next(iter(output.strip().splitlines()), "")


def _words(text: str) -> list[str]:
    plain = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()
