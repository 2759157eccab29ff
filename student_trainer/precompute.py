"""Labels before they are needed: asked of the teacher once for every record of a run, to fill its cache or files."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from services.contract.errors import CancelledError, InvalidInputError
from services.contract.sequences import TokenSequence
from services.contract.settings import Settings
from services.contract.soft_labels import ScoredSequence, hash_sequence
from services.contract.spec import RunSpec
from services.labels.files import LabelWriter
from services.labels.manifest import Manifest
from student_trainer.arguments import MATMUL_DTYPES
from student_trainer.examples import load_examples
from student_trainer.finetune import finetune_teacher
from student_trainer.handshake import PROBE_TEXTS
from student_trainer.labels import label_request
from student_trainer.progress import Progress
from student_trainer.student import load_student, load_tokenizer, output_head, vocabulary_size
from student_trainer.teacher import Teacher, connect_teachers
from student_trainer.teacher_client import TeacherClient

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Precomputed:
    """``sequences`` and their ``tokens`` that teachers were asked for; ``hits`` of them lay in a cache of theirs, and
    ``already`` others in the files.
    """

    sequences: int
    tokens: int
    hits: int
    already: int
    seconds: float


def precompute_labels(
    runs: Sequence[RunSpec],
    *,
    settings: Settings,
    out: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Precomputed:
    """Ask the teachers for all labels that ``runs``, those of one sweep, will ask for; with ``out`` write them there.

    Of on-policy steps nobody knows beforehand what they will ask for.

    Started again after an interruption it goes on: the teacher's cache and the files keep what is there. Raises
    InvalidInputError where no run has soft labels, or ``out`` holds others; TeacherError and DatasetError as training
    does; CancelledError where ``should_stop`` says so.
    """
    started = time.monotonic()
    spec = _with_labels(runs)
    finetune_teacher(spec, settings=settings, should_stop=should_stop)
    tokenizer = load_tokenizer(spec.student, settings)
    if out and spec.teacher and spec.teacher.others:
        raise InvalidInputError(
            "label files hold the labels of one teacher, and this sweep has several",
            fix="`smoothkd labels precompute` fills each teacher's cache; or export with one teacher in the sweep.",
        )
    with ExitStack() as stack:
        teachers = connect_teachers(spec, tokenizer=tokenizer, settings=settings)
        for teacher in teachers:
            stack.callback(teacher.source.close)
        examples = load_examples(
            spec,
            tokenizer=tokenizer,
            settings=settings,
            teacher_max_length=min(teacher.info.max_length for teacher in teachers),
            should_stop=should_stop,
        )
        if spec.distillation.labels.encoding == "projected":
            vocab_size = vocabulary_size(tokenizer)
            teachers = [_projecting(teacher, spec, settings, vocab_size=vocab_size) for teacher in teachers]
        # Records that are alike have the same labels.
        wanted = {_hash(sequence): sequence for sequence in (label_request(e, id=str(e.index)) for e in examples)}
        already = 0
        writer = stack.enter_context(_writer(out, teachers[0])) if out else None
        if writer:
            already = len(wanted)
            wanted = {key: sequence for key, sequence in wanted.items() if key not in writer.already}
            already -= len(wanted)
        hits = [_ask(teacher, wanted.values(), writer=writer, should_stop=should_stop) for teacher in teachers]
    return Precomputed(
        sequences=len(wanted) * len(hits),
        tokens=sum(len(sequence.token_ids) for sequence in wanted.values()) * len(hits),
        hits=sum(hits),
        already=already,
        seconds=time.monotonic() - started,
    )


def _with_labels(runs: Sequence[RunSpec]) -> RunSpec:
    """Any run that asks for labels: those of one sweep ask for the same, whatever their alpha, rate, batch and seed."""
    for run in runs:
        if run.alpha > 0:
            labels = run.distillation.labels.model_copy(update={"path": None})
            distillation = run.distillation.model_copy(update={"labels": labels})
            return run.model_copy(update={"distillation": distillation})
    raise InvalidInputError(
        "alpha is 0 in every run, so none of them has soft labels", fix="Name a sweep or run with alpha above 0."
    )


def _projecting(teacher: Teacher, spec: RunSpec, settings: Settings, *, vocab_size: int) -> Teacher:
    """Projected labels belong to the head of this one student, which training leaves as it is."""
    dtype = MATMUL_DTYPES[spec.training.precision]
    model = load_student(spec.student, settings, vocab_size=vocab_size, frozen_dtype=dtype, seed=spec.seed)
    return teacher.projecting(output_head(model), vocab_size=vocab_size, dtype=dtype)


def _writer(out: Path, teacher: Teacher) -> LabelWriter:
    assert isinstance(teacher.source, TeacherClient)
    manifest = Manifest(teacher=teacher.source.introduction(), options=teacher.options, probe_texts=PROBE_TEXTS)
    return LabelWriter(out, manifest, head=teacher.lm_head)


def _ask(
    teacher: Teacher,
    sequences: Iterable[TokenSequence],
    *,
    writer: LabelWriter | None,
    should_stop: Callable[[], bool],
) -> int:
    """How many of the sequences the teacher had in its cache."""
    by_id = {sequence.id: sequence for sequence in sequences}
    hits = 0
    with Progress("labels", unit="sequences", total=len(by_id)) as progress:
        scored: ScoredSequence
        for done, scored in enumerate(teacher.source.score(by_id.values(), teacher.options), start=1):
            if done == 1:
                teacher.check(scored, by_id[scored.id])
            hits += scored.from_cache
            if writer:
                writer.write(by_id[scored.id], scored)
            progress.update(done, note=f"{hits} from the cache")
            if should_stop():
                raise CancelledError(
                    f"stopped after {done} of {len(by_id)} sequences",
                    fix="Start the same command again: what is there is not computed again.",
                )
    return hits


def _hash(sequence: TokenSequence) -> bytes:
    return hash_sequence(sequence.token_ids, sequence.label_positions)
