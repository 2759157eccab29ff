"""``smoothkd lens train`` and ``smoothkd lens eval``: a lens from labelled summaries, and its worth on others."""

import errno
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from services.contract.errors import DatasetError, InvalidInputError
from services.contract.settings import Settings
from services.evaluation.lookback.examples import INSTRUCTION
from services.evaluation.lookback.features import (
    LensModel,
    MeasuredSummary,
    Progress,
    load_lens_model,
    measure_summaries,
)
from services.evaluation.lookback.fit import TrainingItem, cross_validate, fit_lens
from services.evaluation.lookback.judge import Judge, judge_summaries
from services.evaluation.lookback.labels import LabelledSummary, read_labels
from services.evaluation.lookback.lens import Lens, load_lens
from services.evaluation.lookback.validation import LensReport, report_novel_words, report_scores, validate

log = logging.getLogger(__name__)


def train_lens(
    data: Path,
    *,
    model: str,
    out: Path,
    settings: Settings,
    spans: Literal["windows", "predefined"] = "windows",
    instruction: str = INSTRUCTION,
    folds: int = 5,
    seed: int = 0,
    judge: Judge | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Lens:
    """Trains a lens for ``model`` on ``data`` (labels.read_labels) and writes it to ``out``.

    Records without spans are labelled by ``judge`` and the labels kept beside ``out``; without a judge they are an
    error. ``cache`` is a folder that keeps measured ratios between runs. What the lens is worth is measured on
    ``folds`` folds of documents and stored with it; the lens itself is trained on all of them.
    """
    _require_writable(out)
    summaries = _label(read_labels(data), data, judge, out.with_suffix(".labels.jsonl"), progress)
    lens_model = load_lens_model(model, settings=settings)
    items = _measure(lens_model, summaries, instruction, cache, progress)
    untrained = _untrained(lens_model, items, spans, instruction)
    report, threshold = cross_validate(untrained, items, folds=folds, seed=seed)
    lens, strength = fit_lens(untrained, items)
    training = {
        "data": data.name,
        "data_digest": _digest(data),
        "documents": len({item.group for item in items}),
        "summaries": len(items),
        "skipped": len(summaries) - len(items),
        "truncated_documents": sum(item.measured.truncated for item in items),
        "regularisation": strength,
        "folds": folds,
        "seed": seed,
        "cross_validation": report.model_dump(exclude={"skipped", "seen_in_training"}),
    }
    lens = lens.model_copy(update={"threshold": threshold, "training": training})
    _write(lens, out)
    return lens


def evaluate_lens(
    data: Path,
    *,
    lens: str | Path,
    model: str,
    settings: Settings,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> LensReport:
    """A lens's AUROC on labelled ``data``, beside that of novel words. ``seen_in_training`` warns of its own data."""
    loaded = load_lens(lens)
    summaries = _label(read_labels(data), data, None, data, None)
    lens_model = load_lens_model(model, settings=settings)
    loaded.check_model(model, lens_model.fingerprint)
    items = _measure(lens_model, summaries, loaded.instruction, cache, progress)
    scored = [validate(loaded, item.summary, item.measured, group=item.group) for item in items]
    return report_scores(scored).model_copy(
        update={
            "novel_words": report_novel_words([item.summary for item in items]),
            "skipped": len(summaries) - len(items),
            "seen_in_training": loaded.training.get("data_digest") == _digest(data),
        }
    )


def _label(
    summaries: list[LabelledSummary],
    data: Path,
    judge: Judge | None,
    labels_out: Path,
    progress: Progress | None,
) -> list[LabelledSummary]:
    waiting = sum(not item.labelled for item in summaries)
    if not waiting:
        return summaries
    if judge is None:
        raise DatasetError(
            f"{waiting} of {len(summaries)} records in {data} have no spans", fix="Add their spans, or name a judge."
        )
    judged = judge_summaries(summaries, judge, out=labels_out, progress=progress)
    if judged.unusable or judged.not_found:
        log.warning(
            "the judge gave %d unreadable answers, which are left out, and %d parts that are not in their summary",
            judged.unusable,
            judged.not_found,
        )
    return [item for item in judged.summaries if item.labelled]


def _measure(
    lens_model: LensModel,
    summaries: Sequence[LabelledSummary],
    instruction: str,
    cache: Path | None,
    progress: Progress | None,
) -> list[TrainingItem]:
    pairs = [(item.document, item.summary) for item in summaries]
    measured = measure_summaries(lens_model, pairs, instruction=instruction, cache=cache, progress=progress)
    items = _items(summaries, measured)
    if len(items) < len(summaries):
        missing = next(ratios.missing for ratios in measured if ratios.missing)
        log.warning(
            "%d of %d summaries are left out, the first because %s",
            len(summaries) - len(items),
            len(summaries),
            missing,
        )
    if not items:
        raise DatasetError("no summary could be measured", fix="Use shorter summaries or a longer window.")
    return items


def _items(summaries: Sequence[LabelledSummary], measured: Sequence[MeasuredSummary]) -> list[TrainingItem]:
    numbers: dict[str, int] = {}
    return [
        TrainingItem(summary=summary, measured=ratios, group=numbers.setdefault(summary.document, len(numbers)))
        for summary, ratios in zip(summaries, measured, strict=True)
        if ratios.missing is None
    ]


def _untrained(
    lens_model: LensModel, items: Sequence[TrainingItem], spans: Literal["windows", "predefined"], instruction: str
) -> Lens:
    layers, heads = items[0].measured.ratios_TLH.shape[1:]
    return Lens(
        model=lens_model.name,
        fingerprint=lens_model.fingerprint,
        instruction=instruction,
        spans=spans,
        layers=layers,
        heads=heads,
        intercept=0.0,
        coef=[0.0] * (layers * heads),
    )


def _digest(data: Path) -> str:
    """Identifies labelled data by its content."""
    files = sorted(data.glob("*.jsonl")) if data.is_dir() else [data]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _require_writable(out: Path) -> None:
    """Before anything is measured, which may take hours."""
    probe = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        out.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InvalidInputError(f"{out} cannot be written: {error.strerror}", fix="Name another --out.") from None


def _write(lens: Lens, out: Path) -> None:
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.write_text(lens.model_dump_json(indent=1) + "\n", encoding="utf-8")
    temporary.replace(out)
