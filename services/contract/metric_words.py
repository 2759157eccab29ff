"""How metrics are called and what they say, wherever a person reads them."""

TITLES = {
    "rouge_l": "ROUGE-L",
    "support": "Support",
    "consistency": "Consistency",
    "factual_rate": "Factual rate",
    "factual_consistency": "Factual consistency",
    "entailment": "Entailment",
    "chrf": "chrF",
    "meteor": "METEOR",
    "meteor_exact_stem": "METEOR (stems)",
    "bertscore": "BERTScore",
    "self_consistency": "Self-consistency",
    "acc": "Accuracy",
    "acc_norm": "Accuracy (norm.)",
    "wrong_nll": "NLL of wrong answers",
    "ece": "Calibration error",
    "exact_match": "Exact match",
    "f1": "F1",
    "unsupported_words": "Unsupported words",
}
MEANINGS = {
    "rouge_l": "Overlap with the reference summary: F-measure of the longest common subsequence, 0-100.",
    "support": "Share of the output's checkable words, names and numbers that the source contains, 0-100.",
    "consistency": "How consistent the summary is with its source, by the embedded consistency network, 0-100.",
    "factual_rate": "Share of the output's windows that the Lookback Lens judges factual, 0-100.",
    "factual_consistency": "How consistent the summary is with its source, by Vectara's HHEM, 0-100.",
    "entailment": "How far the source entails the summary, by an NLI cross-encoder, 0-100.",
    "chrf": "Overlap with the reference in character n-grams, 0-100.",
    "meteor": "Overlap with the reference in words, stems, synonyms and their order, 0-100.",
    "meteor_exact_stem": "METEOR without synonyms: words, stems and their order, 0-100.",
    "bertscore": "Likeness of output and reference by an encoder's word vectors, 0-100.",
    "self_consistency": "How far further samples of the same model agree with the output, 0-100.",
    "acc": "Share of questions answered rightly, by likelihood, 0-100.",
    "acc_norm": "Share of questions answered rightly, by length-normalised likelihood, 0-100.",
    "wrong_nll": "Negative log-likelihood of wrong answers, in nats; higher is less sure of what is false.",
    "ece": "Expected calibration error over 15 bins: how far confidence lies from accuracy, 0-100; lower is better.",
    "exact_match": "Share of questions whose answer is the reference's words, 0-100.",
    "f1": "Overlap of the answer's words with the reference's, 0-100.",
    "unsupported_words": "Share of the output's words that a marked span touches, 0-100; lower is better.",
}
DETECTORS = {
    "consistency": "consistency",
    "support": "support",
    "lookback": "factual_rate",
    "hhem": "factual_consistency",
    "nli": "entailment",
    "self_consistency": "self_consistency",
}
"""Whose spans mark an output, and each one's metric; those come first that agree with people on single words."""
FAITHFULNESS = ("support", "consistency", "factual_rate", "factual_consistency", "entailment", "self_consistency")
"""Metrics that say how little is made up; higher is better."""
ACCURACY = ("acc_norm", "acc")
"""Metrics of general ability, by multiple choice; the first that a benchmark has counts."""


def metric_title(metric: str) -> str:
    """The name that readers know a metric by; its own name where it has no other."""
    return TITLES.get(metric, metric)


def measured_on(benchmark: str, metric: str) -> str:
    """The words for one metric of one benchmark."""
    return f"{metric} of {benchmark}"
