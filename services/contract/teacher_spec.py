"""Whose distribution is learnt: a teacher, as it is or fine-tuned first, or the mean of several."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from services.contract.distillation_spec import DistillationSpec, LoraSpec
from services.contract.evaluation_spec import Spec


class TeacherFinetuneSpec(Spec):
    """How the teacher is first fine-tuned on the sweep's data set (paper, section 4.1).

    ``lora`` details the method lora. What is not said here is as for the sweep's students, under ``training``.
    """

    method: Literal["full", "lora"] = "lora"
    epochs: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    batch_size: Annotated[int, Field(ge=1)] = 8
    lora: LoraSpec | None = None

    @model_validator(mode="after")
    def _lora_belongs_to_its_method(self) -> "TeacherFinetuneSpec":
        if self.lora is not None and self.method != "lora":
            raise ValueError(f"lora only goes with method lora; remove lora or the method {self.method}")
        return self


class OtherTeacherSpec(Spec):
    """One of several teachers beside the first, as it is: a server of its own must serve this very model."""

    model: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0


class TeacherSpec(Spec):
    """``model``: a directory or a hub id; the teacher server must have been started with this very model.

    With ``finetune`` it is fine-tuned first, and the teacher server then serves the outcome.

    ``others``: the student learns from the mean of all teachers' distributions, each counted by its ``weight``, which
    only their ratios matter of. All share the student's tokenizer. Responses (sequence level) are decoded by the first.
    """

    model: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    finetune: TeacherFinetuneSpec | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    others: tuple[OtherTeacherSpec, ...] = ()

    @model_validator(mode="after")
    def _teachers_differ(self) -> "TeacherSpec":
        models = [self.model, *(other.model for other in self.others)]
        repeated = next((model for model in models if models.count(model) > 1), None)
        if repeated is not None:
            raise ValueError(f"{repeated} is named as a teacher more than once; give it one weight instead")
        if self.weight != 1 and not self.others:
            raise ValueError("weight only goes with others; remove it, or name further teachers")
        return self

    @property
    def shares(self) -> tuple[float, ...]:
        """What each teacher counts in the mean, the first one's first; they add up to 1."""
        weights = [self.weight, *(other.weight for other in self.others)]
        return tuple(weight / sum(weights) for weight in weights)


def check_others(teacher: TeacherSpec | None, distillation: DistillationSpec) -> None:
    """ValueError for several teachers whose labels cannot be averaged."""
    if teacher is None or not teacher.others:
        return
    labels = distillation.labels
    if labels.encoding not in ("exact", "full"):
        raise ValueError(
            f"the mean of several teachers needs each one's whole distribution, which {labels.encoding} labels do not "
            "give; set labels.encoding to exact"
        )
    if labels.path is not None:
        raise ValueError("label files are those of one teacher; remove labels.path, or teacher.others")
    if distillation.cross_tokenizer is not None:
        raise ValueError("several teachers must share the student's tokenizer; remove cross_tokenizer, or others")


def finetune_batch_size(teacher: TeacherSpec | None) -> tuple[int, ...]:
    """That of the teacher's fine-tuning, where there is one."""
    return (teacher.finetune.batch_size,) if teacher is not None and teacher.finetune is not None else ()
