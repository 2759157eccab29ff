"""Who learns, and from which soft labels."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from services.contract.evaluation_spec import Spec
from services.contract.sequences import Encoding

Divergence = Literal["cross_entropy", "forward_kl", "reverse_kl", "jsd"]


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]


class LoraSpec(Spec):
    """Low-rank adapters instead of full fine-tuning (LoRA, arXiv:2106.09685); the saved model has them merged in.

    ``alpha`` divided by ``rank`` scales what adapters add. ``target_modules``: the names, or ends of names, of the
    linear layers that get one; None means all but the output head. ``quantize`` nf4 holds the frozen weights in 4 bits
    while training (QLoRA, arXiv:2305.14314), which needs the extra ``qlora`` and, to be of use, a GPU.
    """

    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    alpha: Annotated[int, Field(ge=1)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[Names | None, BeforeValidator(_as_tuple)] = None
    quantize: Literal["nf4"] | None = None


class StudentSpec(Spec):
    """``model``: where the student's weights start from, a directory or a hub id. Without ``lora`` all are trained."""

    model: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    lora: LoraSpec | None = None


class LabelSpec(Spec):
    """How soft labels travel.

    ``exact``: hidden states, from which the student has the whole distribution; the default. ``top_k``: the ``k``
    likeliest tokens with the exact mass of all others. ``sampled``: ``draws`` tokens per position (1 to 1024), an
    unbiased estimate (arXiv:2503.16870), the same for the same ``seed``. ``projected``: one vector per position, for
    students whose output head is frozen (``student.lora``). ``full``: every token's probability.

    ``path``: a directory of label files (``smoothkd labels export``); a run reads them there and asks no teacher.
    """

    encoding: Encoding = "exact"
    k: Annotated[int, Field(ge=1, le=1024)] | None = None
    draws: Annotated[int, Field(ge=1, le=1024)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    path: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _options_belong_to_the_encoding(self) -> "LabelSpec":
        for option, owner, example in (("k", "top_k", 64), ("draws", "sampled", 50)):
            given = getattr(self, option) is not None
            if self.encoding == owner and not given:
                raise ValueError(f"encoding {owner} needs {option}, for example {option}: {example}")
            if self.encoding != owner and given:
                raise ValueError(
                    f"{option} only goes with encoding {owner}; remove {option} or the encoding {self.encoding}"
                )
        if self.seed and self.encoding != "sampled":
            raise ValueError(f"labels.seed only goes with encoding sampled; remove it or the encoding {self.encoding}")
        return self


class DistillationSpec(Spec):
    """``level`` says whose responses are learnt: the data set's (word) or the teacher's (sequence).

    ``divergence`` is what alpha weighs: the paper's ``cross_entropy``, or ``forward_kl``, ``reverse_kl`` or ``jsd``
    (with ``beta``, 0.5 unless given; arXiv:2306.13649), which need the whole distribution, so labels that are exact or
    full.
    """

    level: Literal["word", "sequence", "word+sequence"] = "word"
    labels: LabelSpec = LabelSpec()
    temperature: Annotated[float, Field(gt=0)] = 1.0
    divergence: Divergence = "cross_entropy"
    beta: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _divergence_fits(self) -> "DistillationSpec":
        if self.divergence != "cross_entropy" and self.labels.encoding not in ("exact", "full"):
            raise ValueError(
                f"divergence {self.divergence} needs the whole distribution; set labels.encoding to exact, or "
                "divergence to cross_entropy"
            )
        if self.beta is not None and self.divergence != "jsd":
            raise ValueError(f"beta only goes with divergence jsd; remove beta or the divergence {self.divergence}")
        return self


def check_student_fits_labels(student: StudentSpec, distillation: DistillationSpec) -> None:
    """ValueError for projected labels of a head that training would change."""
    if distillation.labels.encoding == "projected" and student.lora is None:
        raise ValueError(
            "encoding projected needs a student whose output head is frozen; train adapters with student.lora, or set "
            "distillation.labels.encoding to exact"
        )
