"""The Lookback Lens over a model's own outputs: which lens fits the model, and the share of windows judged factual."""

import logging
from collections.abc import Sequence

from services.contract.errors import InvalidInputError, SmoothKDError, UnsupportedError
from services.contract.prompt import SUMMARISE
from services.evaluation.answering import Answer
from services.evaluation.lookback.detect import detect
from services.evaluation.lookback.examples import encode_document
from services.evaluation.lookback.features import LensModel, MeasuredSummary, measure_summaries
from services.evaluation.lookback.fingerprint import fingerprint_model
from services.evaluation.lookback.lens import Lens, load_lens
from services.evaluation.lookback.measure import generate_measured
from services.evaluation.lookback.shipped import SHIPPED
from services.evaluation.model import LoadedModel
from services.evaluation.verdict import Verdict

log = logging.getLogger(__name__)


class FactualRate:
    """Judges answers by their lookback ratios, measured while they were generated or, for older outputs, anew."""

    def __init__(self, lens: Lens, *, loaded: LoadedModel, name: str) -> None:
        self.lens = lens
        self._model = LensModel(
            name=name, model=loaded.model, tokenizer=loaded.tokenizer, fingerprint=fingerprint_model(loaded.model)
        )

    def __call__(self, answers: Sequence[Answer]) -> list[Verdict]:
        return [self._judge(answer) for answer in answers]

    def _judge(self, answer: Answer) -> Verdict:
        measured = answer.measured or self._measure(answer)
        if measured.missing is not None or not len(measured.offsets):
            return Verdict(score=None)
        found = detect(self.lens, measured.ratios_TLH, text=answer.output, offsets=measured.offsets)
        return Verdict(score=found.factual_rate, spans=found.spans)

    def _measure(self, answer: Answer) -> MeasuredSummary:
        pairs = [(answer.source, answer.output)]
        return measure_summaries(self._model, pairs, instruction=answer.request.instruction)[0]


def load_factual_rate(named: str | None, *, loaded: LoadedModel, name: str) -> FactualRate:
    """With the lens ``named``, or the shipped one that fits the model.

    A lens serves its own model and those fine-tuned from it, as the paper applies the classifier of the base model to
    every student (``Lens.check_model``). InvalidInputError where none fits, UnsupportedError for a model whose
    attention cannot be read.
    """
    if loaded.model.config.is_encoder_decoder:
        raise UnsupportedError("no attention of an encoder-decoder weighs the prompt against the answer")
    fingerprint = fingerprint_model(loaded.model)
    lenses = [load_lens(named)] if named else [load_lens(shipped) for shipped in SHIPPED]
    fitting = [lens for lens in lenses if lens.fingerprint.relation(fingerprint) is not None]
    if named:
        lenses[0].check_model(name, fingerprint)
    elif not fitting:
        raise InvalidInputError(
            "no lens was trained on this model or one that it was fine-tuned from",
            fix="Train one with `smoothkd lens train`, and name it as evaluation.judges.lens.",
        )
    lens = fitting[0]
    if lens.fingerprint.relation(fingerprint) != "same":
        log.warning("the lens of %s judges a model that was fine-tuned from it or from its like", lens.model)
    _probe(loaded)
    return FactualRate(lens, loaded=loaded, name=name)


def _probe(loaded: LoadedModel) -> None:
    """Whatever cannot be measured is found out before any answer depends on it."""
    try:
        prompt = encode_document(loaded.tokenizer, document="A ferry left.", instruction=SUMMARISE["xsum"])
        generate_measured(loaded.model, [prompt], max_new_tokens=1, pad_id=0, end_ids=loaded.eos_ids)
    except SmoothKDError:
        raise
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:
        raise UnsupportedError(f"the model's attention cannot be read: {error}") from error
