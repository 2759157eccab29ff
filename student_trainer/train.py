"""One run, from its specification to the final model: ``smoothkd train`` and a sweep's TRAIN stages."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainingArguments

from services.contract.errors import CancelledError
from services.contract.records import MetricPoint
from services.contract.settings import Settings
from services.contract.spec import RunSpec
from services.models.architecture import decoder_start
from services.models.card import CARD, RUN_FILE, model_card
from student_trainer.arguments import MATMUL_DTYPES, optimizer_steps, training_arguments, training_device
from student_trainer.data import Collate, Example, collate, split_held_out
from student_trainer.encoder_decoder import collate_apart
from student_trainer.examples import load_examples, longest_example
from student_trainer.file_labels import FileLabels, teacher_in_files
from student_trainer.labels import LabelPrefetcher
from student_trainer.memory import memory_advised
from student_trainer.on_policy import OnPolicy, stop_tokens
from student_trainer.output_head import OutputHead
from student_trainer.packing import pack, require_packable
from student_trainer.progress import Progress
from student_trainer.run_directory import RunDirectory, spec_text, write_whole
from student_trainer.student import load_student, load_tokenizer, output_head, save_student, vocabulary_size
from student_trainer.teacher import Teacher, connect_teachers
from student_trainer.trackers import Trackers
from student_trainer.trainer import DistillationTrainer, Objective, TeacherShare
from student_trainer.watcher import Watcher, stop_on_signals

log = logging.getLogger(__name__)


def train(
    spec: RunSpec,
    *,
    out: Path,
    settings: Settings,
    on_metrics: Callable[[Sequence[MetricPoint]], None] = lambda points: None,
    on_progress: Callable[[float], None] = lambda share: None,
    should_stop: Callable[[], bool] = lambda: False,
    before_rename: Callable[[], None] = lambda: None,
) -> Path:
    """Train the student of ``spec`` and return the directory of its final model, ``out/model``.

    A run that was interrupted goes on from its newest whole checkpoint, to the same weights; one that has ended is
    not trained again. ``on_metrics`` receives each step's values, ``on_progress`` the share done, 0 to 1;
    ``before_rename`` may still refuse the final model, by raising. The model is saved in the run's precision. With
    alpha 0 or labels in files, and the data set's own responses, no teacher is contacted.

    Raises CancelledError after a checkpoint when ``should_stop`` says so, or on SIGTERM or Ctrl-C in the main thread;
    TrainingError when ``out`` holds another run, the loss or gradient is not finite, or memory runs out; TeacherError,
    DatasetError and ModelNotFoundError before anything trains where that can be known.
    """
    directory = RunDirectory(out)
    directory.require_free(spec)
    if directory.model.exists():
        log.info("the run has ended before: %s", directory.model)
        return directory.model

    with stop_on_signals(should_stop) as stopping, _prepared(spec, settings, stopping) as parts:
        steps = optimizer_steps(spec, examples=len(parts.examples))
        progress = Progress(spec.method, unit="steps", total=steps)
        trackers = Trackers(spec, directory=out, offline=settings.offline)

        def report(points: Sequence[MetricPoint]) -> None:
            on_metrics(points)
            trackers.add(points)

        watcher = Watcher(
            directory,
            spec=spec,
            progress=progress,
            on_metrics=report,
            on_progress=on_progress,
            should_stop=stopping,
        )
        trainer = _trainer(parts, training_arguments(spec, directory.checkpoints, steps=steps), watcher)
        if trainer.is_world_process_zero():
            directory.claim(spec)
        with trackers:
            with progress:
                _run(trainer, directory, spec)
            if watcher.stopped:
                raise CancelledError(
                    f"stopped at step {trainer.state.global_step} of {steps}",
                    fix="Start the same run again to go on from its last checkpoint.",
                )
            _publish(trainer, directory, spec, parts=parts, settings=settings, before_rename=before_rename)
    return directory.model


@dataclass(frozen=True, kw_only=True, eq=False)
class _Parts:
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel | PeftModel
    examples: list[Example]
    held_out: list[Example]
    objective: Objective
    teacher_fingerprint: str | None
    collate: Collate
    held_out_collate: Collate


@contextmanager
def _prepared(spec: RunSpec, settings: Settings, stopping: Callable[[], bool]) -> Iterator[_Parts]:
    """All that training needs, checked: what is cheap to refuse comes first."""
    dtype = MATMUL_DTYPES[spec.training.precision]
    with ExitStack() as stack:
        tokenizer = load_tokenizer(spec.student, settings)
        teachers = _teachers(spec, tokenizer, settings)
        for teacher in teachers:
            stack.callback(teacher.source.close)
        teacher_max_length = min((teacher.info.max_length for teacher in teachers), default=None)
        examples = load_examples(
            spec,
            tokenizer=tokenizer,
            settings=settings,
            teacher_max_length=teacher_max_length,
            should_stop=stopping,
        )
        examples, held_out = split_held_out(examples, spec.training.held_out)
        for teacher in teachers:
            if isinstance(teacher.source, FileLabels):
                teacher.source.require(examples)
        vocab_size = vocabulary_size(tokenizer)
        with memory_advised(spec, where=lambda: "while the student was loaded"):
            model = load_student(spec.student, settings, vocab_size=vocab_size, frozen_dtype=dtype, seed=spec.seed)
        if spec.training.packing:
            require_packable(model, vocab_size=vocab_size)
        labels = on_policy = None
        if teachers:
            if spec.distillation.labels.encoding == "projected":
                teachers = [one.projecting(output_head(model), vocab_size=vocab_size, dtype=dtype) for one in teachers]
            for teacher in teachers:
                teacher.verify(examples[0])
            sources, options = {teacher.name: teacher.source for teacher in teachers}, teachers[0].options
            labels = stack.enter_context(LabelPrefetcher(sources, options=options, should_stop=stopping))
            if spec.distillation.on_policy:
                max_length = longest_example(spec, settings=settings, teacher_max_length=teacher_max_length)
                on_policy = OnPolicy(
                    spec=spec.distillation.on_policy,
                    seed=spec.seed,
                    vocab_size=vocab_size,
                    max_length=max_length,
                    stop_ids=stop_tokens(model, tokenizer),
                )
        heads = {teacher.name: teacher.head_on(training_device(), dtype=dtype) for teacher in teachers}
        yield _Parts(
            tokenizer=tokenizer,
            model=model,
            examples=examples,
            held_out=held_out,
            objective=_objective(spec, heads, vocab_size=vocab_size, labels=labels, on_policy=on_policy),
            teacher_fingerprint=", ".join(teacher.info.fingerprint for teacher in teachers) or None,
            collate=partial(pack, max_length=spec.training.max_length) if spec.training.packing else _collate(model),
            held_out_collate=_collate(model),
        )


def _collate(model: PreTrainedModel | PeftModel) -> Collate:
    start_id = decoder_start(model)
    return collate if start_id is None else partial(collate_apart, start_id=start_id)


def _trainer(parts: _Parts, arguments: TrainingArguments, watcher: Watcher) -> DistillationTrainer:
    trainer = DistillationTrainer(
        model=parts.model,
        args=arguments,
        examples=parts.examples,
        held_out=parts.held_out,
        objective=parts.objective,
        callbacks=[watcher],
        collate=parts.collate,
        held_out_collate=parts.held_out_collate,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _publish(
    trainer: DistillationTrainer,
    directory: RunDirectory,
    spec: RunSpec,
    *,
    parts: _Parts,
    settings: Settings,
    before_rename: Callable[[], None],
) -> None:
    """The final model, written by the first process; the others give it their shares of the weights."""
    weights = trainer.whole_weights()
    if not trainer.is_world_process_zero():
        return
    if weights is not None:
        parts = replace(parts, model=_with_weights(weights, spec, parts, settings))
    directory.publish(
        lambda path: _save(path, spec, parts, history=trainer.state.log_history), before_rename=before_rename
    )


def _teachers(spec: RunSpec, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[Teacher]:
    """Whoever gives soft labels: none for supervised fine-tuning, files, or teachers that serve."""
    if spec.alpha == 0:
        return []
    if spec.distillation.labels.path:
        return [teacher_in_files(spec, tokenizer=tokenizer, settings=settings)]
    return connect_teachers(spec, tokenizer=tokenizer, settings=settings)


def _objective(
    spec: RunSpec,
    heads: Mapping[str, OutputHead | None],
    *,
    vocab_size: int,
    labels: LabelPrefetcher | None,
    on_policy: OnPolicy | None,
) -> Objective:
    return Objective(
        vocab_size=vocab_size,
        matmul_dtype=MATMUL_DTYPES[spec.training.precision],
        alpha=spec.alpha,
        temperature=spec.distillation.temperature,
        divergence=spec.distillation.divergence,
        beta=spec.distillation.beta or 0.5,
        labels=labels,
        on_policy=on_policy,
        chunk_size=spec.training.loss_chunk,
        teachers={
            name: TeacherShare(weight=weight, head=head)
            # Without soft labels no teacher is asked, though the run may have one.
            for (name, head), weight in zip(heads.items(), spec.teacher.shares if spec.teacher else (), strict=False)
        },
    )


def _run(trainer: DistillationTrainer, directory: RunDirectory, spec: RunSpec) -> None:
    with trainer.args.main_process_first(desc="looking for checkpoints"):
        checkpoint = directory.newest_checkpoint(spec)
    if checkpoint:
        log.info("going on from %s", checkpoint)
    with memory_advised(spec, where=lambda: f"at step {trainer.state.global_step + 1}"):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _with_weights(
    weights: Mapping[str, Tensor], spec: RunSpec, parts: _Parts, settings: Settings
) -> PreTrainedModel | PeftModel:
    """A model of this process's own instead of the one whose weights all share."""
    objective = parts.objective
    model = load_student(
        spec.student,
        settings,
        vocab_size=objective.vocab_size,
        frozen_dtype=objective.matmul_dtype,
        seed=spec.seed,
    )
    model.load_state_dict(weights)
    return model


def _save(path: Path, spec: RunSpec, parts: _Parts, *, history: Sequence[Mapping[str, float]]) -> None:
    """The final model with its tokenizer, generation settings, specification and card."""
    save_student(parts.model, parts.tokenizer, path, dtype=parts.objective.matmul_dtype, base_model=spec.student.model)
    last: Mapping[str, float] = next((logs for logs in reversed(history) if "tokens_per_second" in logs), {})
    card = model_card(
        spec,
        teacher_fingerprint=parts.teacher_fingerprint,
        examples=len(parts.examples),
        steps=optimizer_steps(spec, examples=len(parts.examples)),
        losses={name: last[name] for name in ("loss", "hard_loss", "soft_loss") if name in last}
        | {name: value for name, value in history[-1].items() if name.startswith("held_out")},
        task="text2text-generation" if parts.model.config.is_encoder_decoder else "text-generation",
    )
    write_whole(path / CARD, card)
    write_whole(path / RUN_FILE, spec_text(spec))
