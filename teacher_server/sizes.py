"""How large things get: labels in memory and on the wire."""

from services.contract.sequences import LabelOptions


def label_bytes(
    options: LabelOptions,
    *,
    positions: int,
    vocab_size: int,
    hidden_size: int,
    student_hidden_size: int = 0,
    state_bytes: int = 4,
) -> int:
    """Most bytes that the labels of one sequence take, with the actual tokens' log-probabilities.

    ``student_hidden_size`` counts for projected labels. ``state_bytes``: of one component of a hidden state.
    """
    if options.encoding == "exact":
        per_position = state_bytes * hidden_size
    elif options.encoding == "top_k":
        per_position = 6 * min(options.k, vocab_size) + 4
    elif options.encoding == "sampled":
        # Ids of 4 bytes with counts of up to 2, and how many there are.
        per_position = 6 * min(options.draws, vocab_size) + 2
    elif options.encoding == "projected":
        per_position = 4 * student_hidden_size + 4
    else:
        per_position = 2 * vocab_size
    return positions * (per_position + 4)
