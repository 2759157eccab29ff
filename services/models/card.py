"""The model card of a student: what made it, and how it scored, where the hub's readers and programs look for it."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from services.contract.distillation_spec import LabelSpec
from services.contract.metric_words import metric_title
from services.contract.records import Score
from services.contract.spec import RunSpec

CARD = "README.md"
RUN_FILE = "run.yaml"
"""The run's specification inside the model's directory."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")
_SCORES = "## Scores"
_METHODS = {
    "SFT": "supervised fine-tuning on the data set's own responses",
    "KD": "word-level knowledge distillation: cross-entropy on the data set's responses plus alpha times the "
    "{divergence} against the teacher's soft labels",
    "SeqKD": "sequence-level knowledge distillation: the teacher's own greedy responses",
    "SeqKD+KD": "the teacher's own greedy responses plus alpha times the {divergence} against its soft labels",
    "GKD": "word-level knowledge distillation, in a part of the steps on the student's own responses (on-policy)",
    "SeqKD+GKD": "the teacher's own greedy responses with its soft labels, and in a part of the steps the student's "
    "own (on-policy)",
}
_DIVERGENCES = {
    "cross_entropy": "cross-entropy",
    "forward_kl": "forward Kullback-Leibler divergence",
    "reverse_kl": "reverse Kullback-Leibler divergence",
    "jsd": "generalised Jensen-Shannon divergence",
}
_ACROSS_TOKENIZERS = "distance of sorted probabilities (universal logit distillation)"


def model_card(
    spec: RunSpec,
    *,
    teacher_fingerprint: str | None,
    examples: int,
    steps: int,
    losses: Mapping[str, float],
    task: str = "text-generation",
) -> str:
    """The card of a run that has just ended, without scores: Markdown behind YAML metadata, as model hubs read it.

    ``losses``: the last logged values by name, in nats per response token; ``examples``: records learnt from;
    ``task``: what the hub calls what the model does.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=_hub_id(spec.student.model),
        datasets=[spec.dataset.path] if "/" in (_hub_id(spec.dataset.path) or "") else None,
        library_name="transformers",
        pipeline_tag=task,
        tags=["smoothkd", "knowledge-distillation"] if spec.needs_teacher else ["smoothkd"],
    )
    title = f"{Path(spec.student.model).name}, {spec.method}"
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        f"Made by smoothkd with {_METHODS[spec.method.split()[0]].format(divergence=_divergence(spec))}.",
        _table(("", "value"), _what_made_it(spec, teacher_fingerprint, examples=examples, steps=steps)),
        "## Final losses",
        _table(("per response token, in nats", "value"), [(name, f"{value:.4f}") for name, value in losses.items()])
        if losses
        else "None was logged.",
        "## Training it again",
        f"`{RUN_FILE}` beside this file is the whole specification: `smoothkd train {RUN_FILE} --out DIRECTORY`.",
        _SCORES,
        "Not evaluated yet.",
    ]
    return "\n\n".join(sections) + "\n"


def write_scores(directory: Path, scores: Sequence[Score]) -> None:
    """Put an evaluation into the card of the model in ``directory``, in place of an earlier one.

    Nothing is done for a model without a card of this platform's.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    path = directory / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if f"\n{_SCORES}\n" not in text:
        return
    card = ModelCard(text[: text.rindex(f"\n{_SCORES}\n")])
    data = cast(ModelCardData, card.data)
    data.model_name = directory.absolute().parent.name
    data.eval_results = [
        EvalResult(
            task_type=data.pipeline_tag or "text-generation",
            dataset_type=score.benchmark,
            dataset_name=score.benchmark,
            metric_type=score.metric,
            metric_value=score.value,
        )
        for score in scores
        if score.value is not None
    ] or None
    rows = [
        (
            score.benchmark,
            metric_title(score.metric),
            f"not measured: {score.missing}" if score.value is None else f"{score.value:.2f}",
            f"{score.items:,}",
        )
        for score in scores
    ]
    table = _table(("benchmark", "metric", "value", "items"), rows)
    unfinished = path.with_name(f".{CARD}.{os.getpid()}.tmp")
    unfinished.write_text(f"{card.content.rstrip()}\n\n{_SCORES}\n\n{table}\n", encoding="utf-8")
    os.replace(unfinished, path)


def _what_made_it(
    spec: RunSpec, teacher_fingerprint: str | None, *, examples: int, steps: int
) -> list[tuple[str, str]]:
    training, distillation = spec.training, spec.distillation
    rows = [("method", spec.method), ("student", _with_revision(spec.student.model, spec.student.revision))]
    if spec.student.lora is not None:
        lora = spec.student.lora
        rows.append(("adapters", f"LoRA of rank {lora.rank}, alpha {lora.alpha}, merged; also in adapter/"))
    if spec.teacher is not None and spec.needs_teacher:
        counts = f", weight {spec.teacher.shares[0]:.3g}" if spec.teacher.others else ""
        rows.append(("teacher", _with_revision(spec.teacher.model, spec.teacher.revision) + counts))
        if spec.teacher.finetune is not None:
            rows.append(("teacher's fine-tuning", f"{spec.teacher.finetune.method}, on the same records"))
        for other, share in zip(spec.teacher.others, spec.teacher.shares[1:], strict=True):
            rows.append(("another teacher", f"{_with_revision(other.model, other.revision)}, weight {share:.3g}"))
        if teacher_fingerprint:
            rows.append(("teacher's fingerprint", teacher_fingerprint))
        if spec.alpha > 0:
            rows += [
                ("alpha", f"{spec.alpha:g}"),
                ("temperature", f"{distillation.temperature:g}"),
                ("divergence", _divergence(spec)),
                ("soft labels", _soft_labels(distillation.labels)),
            ]
        if distillation.on_policy is not None:
            rows.append(("on-policy", f"{distillation.on_policy.fraction:.0%} of the steps"))
    learnt = f"{spec.dataset.path}, split {spec.dataset.split}: {examples:,} records"
    rows += [
        ("data", learnt + (f", {training.held_out} held out" if training.held_out else "")),
        ("epochs, steps", f"{training.epochs}, {steps:,}"),
        ("learning rate", f"{spec.learning_rate:g}, {training.lr_scheduler}, warm-up {training.warmup_ratio:g}"),
        ("batch size", f"{spec.batch_size} records"),
        ("longest sequence", f"{training.max_length} tokens"),
        ("precision", training.precision),
        ("weight decay, gradient norm", f"{training.weight_decay:g}, at most {training.max_grad_norm:g}"),
        ("seed", str(spec.seed)),
        ("run key", spec.key),
    ]
    return rows


def _divergence(spec: RunSpec) -> str:
    """What alpha weighs."""
    distillation = spec.distillation
    if distillation.cross_tokenizer is not None:
        return _ACROSS_TOKENIZERS
    beta = f" (beta {distillation.beta or 0.5:g})" if distillation.divergence == "jsd" else ""
    return _DIVERGENCES[distillation.divergence] + beta


def _soft_labels(labels: LabelSpec) -> str:
    options = {"top_k": f", k {labels.k}", "sampled": f", {labels.draws} draws, seed {labels.seed}"}
    return labels.encoding + options.get(labels.encoding, "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _with_revision(model: str, revision: str | None) -> str:
    return f"{model}, revision {revision}" if revision else model


def _hub_id(name: str) -> str | None:
    """None for a path, which a hub would refuse."""
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None
