"""Who judged: what values of a metric depend on beside the outputs, by what it is rather than by what it is called."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence

from services.contract.errors import InvalidInputError
from services.contract.evaluation_spec import SUMMARISATION, EvaluationSpec, JudgeSpec
from services.evaluation.consistency.weights import SHIPPED as NETWORK
from services.evaluation.consistency.weights import WEIGHTS
from services.evaluation.lookback.fingerprint import ModelFingerprint
from services.evaluation.lookback.lens import load_lens
from services.evaluation.lookback.shipped import SHIPPED as LENSES


def judged_by(
    benchmark: str,
    spec: EvaluationSpec,
    *,
    references: Callable[[], Sequence[str]],
    architecture: Mapping[str, int | str],
) -> dict[str, str]:
    """By metric, in words: equal words, comparable values. Metrics that nothing else goes into are not there.

    ``references``: those of the items under evaluation, asked for where their words are weighed. ``architecture``: of
    the model under evaluation, which decides which shipped lens fits.
    """
    if benchmark not in SUMMARISATION:
        return {}
    judges = spec.judges
    words: dict[str, Callable[[], str]] = {
        "factual_rate": lambda: _lens(judges.lens, architecture),
        "consistency": _network,
        "factual_consistency": lambda: judges.hhem,
        "entailment": lambda: str(judges.nli),
        "bertscore": lambda: _encoder(judges, references),
        "self_consistency": lambda: f"{spec.samples} samples and {_network()}",
    }
    return {metric: words[metric]() for metric in spec.metrics if metric in words}


def _lens(named: str | None, architecture: Mapping[str, int | str]) -> str:
    try:
        lenses = [load_lens(name) for name in ([named] if named else LENSES)]
    except InvalidInputError:
        # That it cannot be had is told where it is needed.
        return f"the lens {named}"
    # Whose weights would fit, among lenses of one architecture, is known once the model is loaded.
    model = ModelFingerprint(architecture=dict(architecture), weights=None)
    fitting = [lens for lens in lenses if named or lens.fingerprint.relation(model)]
    if not fitting:
        return "no lens that fits"
    return " or ".join(f"the lens of {lens.model} ({lens.digest[:8]})" for lens in fitting)


def _encoder(judges: JudgeSpec, references: Callable[[], Sequence[str]]) -> str:
    if not judges.idf:
        return judges.encoder
    found = references()
    digest = hashlib.sha256("\0".join(sorted(found)).encode("utf-8", "surrogatepass")).hexdigest()
    return f"{judges.encoder} with idf over {len(found)} references ({digest[:8]})"


@functools.cache
def _network() -> str:
    return f"the consistency network {hashlib.sha256((NETWORK / WEIGHTS).read_bytes()).hexdigest()[:8]}"
