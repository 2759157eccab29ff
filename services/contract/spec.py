"""What to do: the sweep a user writes and the runs it expands to.

The same classes are the body of ``POST /v1/sweeps``, the YAML file, and what a worker reads. They say
nothing about where things run; that is ``services.contract.settings``.
"""

import hashlib
import itertools
import json
import re
from collections import Counter
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from services.contract.distillation_spec import (
    DistillationSpec,
    LoraSpec,
    StudentSpec,
    check_on_policy,
    check_student_fits_labels,
)
from services.contract.evaluation_spec import EvaluationSpec, Spec
from services.contract.teacher_spec import TeacherSpec, check_others, finetune_batch_size
from services.contract.training_spec import TrainingSpec, check_batches

NAME = re.compile(r"^[a-z0-9][a-z0-9._-]{0,62}$")


class DatasetSpec(Spec):
    """Records with databricks-dolly-15k's columns: instruction, context, response, category.

    ``path`` is ``demo_instructions`` (shipped), a local .jsonl or .parquet file, or a hub id. ``limit``
    keeps the first records only.
    """

    path: Annotated[str, Field(min_length=1)]
    split: str = "train"
    limit: Annotated[int, Field(ge=1)] | None = None


def _each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("an empty axis makes no runs; list at least one value")
    repeated = sorted(value for value, count in Counter(values).items() if count > 1)
    if repeated:
        raise ValueError(f"lists {', '.join(map(str, repeated))} more than once; list each value once")
    return values


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, int | float) else value


Alphas = Annotated[
    tuple[Annotated[float, Field(ge=0)], ...],
    BeforeValidator(_as_tuple),
    AfterValidator(_each_once),
]
LearningRates = Annotated[
    tuple[Annotated[float, Field(gt=0)], ...],
    BeforeValidator(_as_tuple),
    AfterValidator(_each_once),
]
Counts = Annotated[
    tuple[Annotated[int, Field(ge=1)], ...],
    BeforeValidator(_as_tuple),
    AfterValidator(_each_once),
]
Seeds = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=2**32)], ...],
    BeforeValidator(_as_tuple),
    AfterValidator(_each_once),
]


class GridSpec(Spec):
    """The axes of a sweep; every combination is a run. ``batch_size`` counts records per optimizer step."""

    alpha: Alphas = (0.0,)
    learning_rate: LearningRates = (1e-5,)
    batch_size: Counts = (4,)
    seed: Seeds = (0,)


class RunSpec(Spec):
    """One student: a point of the grid with everything that decides its weights and scores.

    ``teacher`` is None for supervised fine-tuning (SFT): word level with alpha 0 never contacts a teacher.
    """

    student: StudentSpec
    teacher: TeacherSpec | None = None
    dataset: DatasetSpec
    distillation: DistillationSpec = DistillationSpec()
    alpha: Annotated[float, Field(ge=0)] = 0.0
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    batch_size: Annotated[int, Field(ge=1)] = 4
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    training: TrainingSpec = TrainingSpec()
    evaluation: EvaluationSpec = EvaluationSpec()

    @model_validator(mode="after")
    def _holds_together(self) -> "RunSpec":
        _check_level_against_alpha(self.distillation.level, (self.alpha,))
        if self.teacher is None and self.needs_teacher:
            raise ValueError(
                f"alpha {self.alpha:g} at level {self.distillation.level} needs a teacher; name one under teacher.model"
            )
        check_student_fits_labels(self.student, self.distillation)
        check_on_policy(self.distillation, self.training, (self.alpha,))
        check_others(self.teacher, self.distillation)
        check_batches(self.training, (self.batch_size, *finetune_batch_size(self.teacher)))
        return self

    @property
    def needs_teacher(self) -> bool:
        return self.alpha > 0 or self.decodes

    @property
    def asks_teacher(self) -> bool:
        """Whether a teacher must be serving: labels may also lie in files."""
        return self.decodes or (self.alpha > 0 and self.distillation.labels.path is None)

    @property
    def single_teachers(self) -> "tuple[RunSpec, ...]":
        """This run with each of its teachers alone, as it asks them for labels; empty where it has none."""
        if self.teacher is None:
            return ()
        others = [TeacherSpec(model=other.model, revision=other.revision) for other in self.teacher.others]
        first = self.teacher.model_copy(update={"others": (), "weight": 1.0})
        return tuple(self.model_copy(update={"teacher": teacher}) for teacher in (first, *others))

    @property
    def decodes(self) -> bool:
        """Whether responses are the teacher's own decodes (sequence level)."""
        return self.distillation.level != "word"

    @property
    def method(self) -> str:
        """The row this run belongs to in result tables: SFT, KD, SeqKD or SeqKD+KD, with its alpha.

        GKD stands for KD of which a part is on-policy.
        """
        if not self.needs_teacher:
            return "SFT"
        name = "KD" if self.distillation.on_policy is None else "GKD"
        if self.decodes:
            name = f"SeqKD+{name}" if self.alpha > 0 else "SeqKD"
        return f"{name} alpha={self.alpha:g}" if self.alpha > 0 else name

    @property
    def key(self) -> str:
        """16 hex digits that depend on the content alone; equal specs have equal keys on every machine."""
        return content_key(self.model_dump(mode="json"))

    @property
    def decode_key(self) -> str | None:
        """16 hex digits of all that the teacher's decodes depend on; None for a run that uses none.

        Runs with the same key learn the same decoded responses, which are made once.
        """
        if not self.decodes or self.teacher is None:
            return None
        return content_key(
            {
                "teacher": self.finetune_key or self.teacher.model_dump(mode="json", exclude={"others", "weight"}),
                "dataset": self.dataset.model_dump(mode="json"),
                "max_length": self.training.max_length,
            }
        )

    @property
    def finetune_run(self) -> "RunSpec | None":
        """The run that makes this one's teacher: supervised fine-tuning on the same records.

        None where the teacher is used as it is, and where none is asked.
        """
        if self.teacher is None or self.teacher.finetune is None or not self.asks_teacher:
            return None
        how = self.teacher.finetune
        lora = (how.lora or LoraSpec()) if how.method == "lora" else None
        return RunSpec(
            student=StudentSpec(model=self.teacher.model, revision=self.teacher.revision, lora=lora),
            dataset=self.dataset,
            learning_rate=how.learning_rate,
            batch_size=how.batch_size,
            training=self.training.model_copy(update={"epochs": how.epochs}),
        )

    @property
    def finetune_key(self) -> str | None:
        """16 hex digits of all that the fine-tuned teacher depends on; runs with the same key share it."""
        run = self.finetune_run
        return run.key if run is not None else None


def _is_name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise ValueError(
            "should have 1 to 63 characters, each a lower-case letter, a digit, '.', '_' or '-', and begin with a "
            "letter or a digit"
        )
    return text


class SweepSpec(Spec):
    """A comparison: one teacher, one student, one data set, and a grid of runs."""

    name: Annotated[str, AfterValidator(_is_name), Field(json_schema_extra={"pattern": NAME.pattern})]
    teacher: TeacherSpec | None = None
    student: StudentSpec
    dataset: DatasetSpec
    distillation: DistillationSpec = DistillationSpec()
    grid: GridSpec = GridSpec()
    training: TrainingSpec = TrainingSpec()
    evaluation: EvaluationSpec = EvaluationSpec()

    @model_validator(mode="after")
    def _holds_together(self) -> "SweepSpec":
        _check_level_against_alpha(self.distillation.level, self.grid.alpha)
        check_student_fits_labels(self.student, self.distillation)
        check_on_policy(self.distillation, self.training, self.grid.alpha)
        check_others(self.teacher, self.distillation)
        batch_sizes = (*self.grid.batch_size, *finetune_batch_size(self.teacher))
        check_batches(self.training, batch_sizes)
        needs_teacher = max(self.grid.alpha) > 0 or self.distillation.level != "word"
        if needs_teacher and self.teacher is None:
            raise ValueError("this grid distils, so it needs a teacher; name one under teacher.model")
        return self


def expand(sweep: SweepSpec) -> list[RunSpec]:
    """One run per point of the grid, alpha varying slowest and seed fastest; pure and deterministic.

    A run that needs no teacher carries none, and no distillation settings, so that the same SFT baseline has
    the same key in every sweep. No step is on-policy where alpha is 0.
    """
    runs = []
    grid = sweep.grid
    for alpha, learning_rate, batch_size, seed in itertools.product(
        grid.alpha, grid.learning_rate, grid.batch_size, grid.seed
    ):
        is_sft = alpha == 0 and sweep.distillation.level == "word"
        distillation = DistillationSpec() if is_sft else sweep.distillation
        if alpha == 0:
            distillation = distillation.model_copy(update={"on_policy": None})
        runs.append(
            RunSpec(
                student=sweep.student,
                teacher=None if is_sft else sweep.teacher,
                dataset=sweep.dataset,
                distillation=distillation,
                alpha=alpha,
                learning_rate=learning_rate,
                batch_size=batch_size,
                seed=seed,
                training=sweep.training,
                evaluation=sweep.evaluation,
            )
        )
    return runs


def content_key(content: Any) -> str:
    """16 hex digits of the SHA-256 over canonical JSON (sorted keys, no spaces)."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _check_level_against_alpha(level: str, alphas: tuple[float, ...]) -> None:
    if level == "sequence" and any(alpha > 0 for alpha in alphas):
        raise ValueError(
            "level sequence learns the teacher's decodes with alpha 0; set alpha to 0, or level to word+sequence"
        )
