"""``smoothkd overconfidence``: how sure models are of wrong answers (Nguyen et al., 2025, appendix A)."""

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field
from scipy.stats import gaussian_kde

from services.contract.errors import InvalidInputError
from services.contract.evaluation_spec import BenchmarkSpec
from services.contract.records import Record
from services.contract.settings import Settings
from services.datasets.choices import check_choices
from services.evaluation.calibration import Array, Calibration, measure_calibration, wrong_nll
from services.evaluation.model import load_model
from services.evaluation.multiple_choice import CALIBRATED, ChoiceItem, answer_multiple_choice
from services.models.resolve import resolve_model
from services.reports.colours import DISTILLED
from services.reports.folder import make_folder
from services.reports.page import page_html, table_html
from services.reports.plots import density_plot, figure_html, reliability_plot

GRID = 400
NLL_LABEL = "negative log-likelihood of wrong answers (nats)"


class ModelConfidence(Record):
    """One model; ``wrong_nll`` holds every wrong answer of every question, in order."""

    model: str
    examples: int = Field(description="Questions shown with their answers before each.")
    calibration: Calibration
    wrong_nll: list[float]


def measure_overconfidence(
    models: Sequence[str],
    *,
    data: str | None,
    out: Path,
    examples: Sequence[int],
    limit: int | None,
    batch_size: int,
    settings: Settings,
) -> list[ModelConfidence]:
    """Asks every model CommonsenseQA; JSON, two plots and a page with both go to ``out``.

    ``data`` is a file of the data set's columns, None the hub's. ``examples`` are one number for all models or one for
    each: base models want some, tuned ones mostly none. One model is in memory at a time.
    """
    if len(examples) not in (1, len(models)):
        raise InvalidInputError(
            f"{len(models)} models have {len(examples)} numbers of examples",
            fix="Give one number for all, or one for each model in their order.",
        )
    shown = list(examples) if len(examples) > 1 else [*examples] * len(models)
    labels = _labels(models, shown)
    benchmark = BenchmarkSpec(name=CALIBRATED, path=data)
    if data is not None:
        check_choices(benchmark)
    make_folder(out)
    found = []
    for label, model, count in zip(labels, models, shown, strict=True):
        directory = resolve_model(model, settings=settings)
        answered = answer_multiple_choice(
            benchmark,
            loaded=load_model(directory),
            directory=directory,
            limit=limit,
            batch_size=batch_size,
            settings=settings,
            examples=count,
        )
        found.append(describe_model(label, answered.items, examples=count))
        gc.collect()
    write_overconfidence(found, out)
    return found


def describe_model(label: str, items: Sequence[ChoiceItem], *, examples: int) -> ModelConfidence:
    """A model's calibration and its likelihood of every wrong answer."""
    return ModelConfidence(
        model=label,
        examples=examples,
        calibration=measure_calibration([item.likelihoods for item in items], [item.right for item in items]),
        wrong_nll=[float(value) for item in items for value in wrong_nll(item.likelihoods, item.right)],
    )


def densities(samples: Mapping[str, Sequence[float]]) -> dict[str, tuple[Array, Array]]:
    """(positions, densities) of each sample, over one range: Gaussian kernels of Scott's width (Scott, 1992)."""
    for label, values in samples.items():
        if len(set(values)) < 2:
            raise InvalidInputError(
                f"{label} gives every wrong answer the same likelihood: there is no density to draw",
                fix="Use more questions, or check the model.",
            )
    kernels = {label: gaussian_kde(np.asarray(values, dtype=np.float64)) for label, values in samples.items()}
    # Three widths beyond the outermost answers the curves have come down to nothing.
    widest = 3 * max(float(np.sqrt(kernel.covariance[0, 0])) for kernel in kernels.values())
    low = max(0.0, min(min(values) for values in samples.values()) - widest)
    positions = np.linspace(low, max(max(values) for values in samples.values()) + widest, GRID)
    return {label: (positions, kernel(positions)) for label, kernel in kernels.items()}


def write_overconfidence(models: Sequence[ModelConfidence], out: Path) -> None:
    """Each file appears only when it is whole."""
    colours = {one.model: DISTILLED[place % len(DISTILLED)] for place, one in enumerate(models)}
    density = density_plot(densities({one.model: one.wrong_nll for one in models}), colours=colours, x_label=NLL_LABEL)
    reliability = reliability_plot(
        {one.model: [(b.confidence, b.accuracy, b.items) for b in one.calibration.bins] for one in models},
        colours=colours,
    )
    body = (
        table_html(COLUMNS, [table_row(one) for one in models])
        + figure_html(density, caption=f"Kernel density of the {NLL_LABEL}; further right is less sure")
        + figure_html(reliability, caption="Reliability: accuracy over confidence, 15 bins; the diagonal is calibrated")
    )
    counts = list(dict.fromkeys(one.examples for one in models))
    examples = f"{counts[0]} examples before each" if len(counts) == 1 else "with examples before each"
    facts = f"CommonsenseQA, {models[0].calibration.items} questions, {examples}"
    files = {
        "overconfidence.json": "[" + ",\n".join(one.model_dump_json() for one in models) + "]\n",
        "density.svg": density,
        "reliability.svg": reliability,
        "overconfidence.html": page_html("Overconfidence", facts, body),
    }
    make_folder(out)
    for name, text in files.items():
        partial = out / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(out / name)


COLUMNS = ("Model", "Questions", "Accuracy %", "Confidence %", "ECE %", "Entropy (nats)", "NLL of wrong answers (nats)")


def table_row(one: ModelConfidence) -> list[str]:
    """In the order of COLUMNS."""
    found = one.calibration
    return [
        one.model,
        str(found.items),
        *(f"{100 * value:.2f}" for value in (found.accuracy, found.confidence, found.ece)),
        *(f"{value:.3f}" for value in (found.entropy, found.wrong_nll)),
    ]


def _labels(models: Sequence[str], examples: Sequence[int]) -> list[str]:
    """The last part of each name where that tells the models apart, else the whole names; what else sets them apart."""
    if len(set(zip(models, examples, strict=True))) < len(models):
        raise InvalidInputError(
            "a model is named twice with one number of examples", fix="Name it once, or with other --examples."
        )
    short = [model.rstrip("/").rpartition("/")[2] for model in models]
    names = short if len(set(short)) == len(set(models)) else list(models)
    if len(set(examples)) == 1:
        return names
    return [f"{name} ({count} examples)" for name, count in zip(names, examples, strict=True)]
