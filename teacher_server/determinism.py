"""Do labels depend on what else is computed with them? Sums in other orders round otherwise."""

import asyncio

import numpy as np

from services.contract.sequences import LabelOptions, TokenSequence
from teacher_server.engine import Engine
from teacher_server.self_check import probe_ids

COPIES = 8
"""Of the probe, scored at once; as many other sequences are under way between them."""

_OPTIONS = LabelOptions(encoding="top_k", k=1)
"""The lightest labels that come with the log-probability of every token."""


async def determinism_spread(engine: Engine) -> float:
    """Largest difference in nats between log-probabilities that the same token is given.

    The probe is scored alone, then several times at once among sequences of other lengths, so that batches differ.
    """
    probe = probe_ids(engine)
    alone = await engine.score(_sequence("alone", probe), _OPTIONS)
    among_others = []
    for copy in range(COPIES):
        among_others.append(_sequence(f"copy-{copy}", probe))
        # From a few tokens to the whole probe, each beginning elsewhere.
        rotated = probe[copy:] + probe[:copy]
        among_others.append(_sequence(f"other-{copy}", rotated[: max(2, len(probe) * (copy + 1) // COPIES)]))
    answers = await asyncio.gather(*(engine.score(sequence, _OPTIONS) for sequence in among_others))
    copies = [alone, *(answer for answer in answers if answer.id.startswith("copy-"))]
    logprobs_CT = np.stack([answer.token_logprobs_P.astype(np.float64) for answer in copies])
    return float(np.ptp(logprobs_CT, axis=0).max())


def _sequence(name: str, token_ids: list[int]) -> TokenSequence:
    return TokenSequence(id=name, token_ids=token_ids, label_positions=list(range(1, len(token_ids))))
