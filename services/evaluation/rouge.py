"""ROUGE-L, the overlap of a summary with its reference (Lin, 2004)."""

from rouge_score import rouge_scorer


def rouge_l(output: str, *, reference: str) -> float | None:
    """F-measure of the longest common subsequence, times 100, over the whole text as one sequence.

    Words are stemmed (Porter), as results on CNN/DailyMail and XSum are customarily reported. An empty output has 0.
    The package reads a-z and 0-9 only and would compare nothing but the numbers of texts in other scripts: None where
    less than half of the reference's letters are a-z.
    """
    letters = [sign for sign in reference.lower() if sign.isalpha()]
    if letters and 2 * sum(sign.isascii() for sign in letters) < len(letters):
        return None
    return 100 * float(_SCORER.score(reference, output)["rougeL"].fmeasure)


_SCORER = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
