"""ROUGE-L, the overlap of a summary with its reference (Lin, 2004)."""

from rouge_score import rouge_scorer


def rouge_l(output: str, *, reference: str) -> float:
    """F-measure of the longest common subsequence, times 100, over the whole text as one sequence.

    Words are stemmed (Porter), as results on CNN/DailyMail and XSum are customarily reported. An empty output has 0.
    The package reads a-z and 0-9 only, so texts in other scripts have 0.
    """
    return 100 * float(_SCORER.score(reference, output)["rougeL"].fmeasure)


_SCORER = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
