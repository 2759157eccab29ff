"""Who learns, and from which soft labels."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from services.contract.evaluation_spec import Spec
from services.contract.sequences import Encoding
from services.contract.training_spec import TrainingSpec

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


class OnPolicySpec(Spec):
    """On-policy distillation (GKD, arXiv:2306.13649): how many steps learn from the student's own responses.

    That share of the optimizer steps, chosen by the run's seed, keeps the prompts of its records and lets the student
    decode the responses, at ``temperature`` (0 is greedy) and up to ``max_new_tokens``; the teacher scores them when
    they are there. Such steps take the soft term alone, for the hard one belongs to responses that are to be learnt.
    """

    fraction: Annotated[float, Field(gt=0, le=1)]
    temperature: Annotated[float, Field(ge=0)] = 1.0
    max_new_tokens: Annotated[int, Field(ge=1)] = 128


class DistillationSpec(Spec):
    """``level`` says whose responses are learnt: the data set's (word) or the teacher's (sequence).

    ``divergence`` is what alpha weighs: the paper's ``cross_entropy``, or ``forward_kl``, ``reverse_kl`` or ``jsd``
    (with ``beta``, 0.5 unless given; arXiv:2306.13649), which need the whole distribution, so labels that are exact or
    full.

    ``cross_tokenizer`` uld lets the teacher have another tokenizer than the student (universal logit distillation,
    arXiv:2402.12030); without it such a pair is refused. Alpha then weighs the distance between both distributions'
    sorted probabilities, at the positions where both tokenizers have read the same text; labels exact, full or top_k.
    """

    level: Literal["word", "sequence", "word+sequence"] = "word"
    labels: LabelSpec = LabelSpec()
    temperature: Annotated[float, Field(gt=0)] = 1.0
    divergence: Divergence = "cross_entropy"
    beta: Annotated[float, Field(gt=0, lt=1)] | None = None
    cross_tokenizer: Literal["uld"] | None = None
    on_policy: OnPolicySpec | None = None

    @model_validator(mode="after")
    def _cross_tokenizer_fits(self) -> "DistillationSpec":
        if self.cross_tokenizer is None:
            return self
        if self.labels.encoding not in ("exact", "full", "top_k"):
            raise ValueError(
                f"cross_tokenizer compares sorted probabilities, which {self.labels.encoding} labels do not give; set "
                "labels.encoding to exact, full or top_k"
            )
        if self.divergence != "cross_entropy":
            raise ValueError(
                f"divergence {self.divergence} compares token with token, which cross_tokenizer cannot; remove either"
            )
        return self

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

    @model_validator(mode="after")
    def _on_policy_fits(self) -> "DistillationSpec":
        if self.on_policy is not None and self.labels.path is not None:
            raise ValueError(
                "on_policy needs labels of what the student will say, which no file holds; remove labels.path and let "
                "a teacher serve, or remove on_policy"
            )
        if self.on_policy is not None and self.cross_tokenizer is not None:
            raise ValueError(
                "on_policy sends the student's own tokens to the teacher, which cross_tokenizer says has others; "
                "remove either"
            )
        return self


def check_on_policy(distillation: DistillationSpec, training: TrainingSpec, alphas: tuple[float, ...]) -> None:
    """ValueError for steps that would have nothing to learn, or weights that the student cannot decode with."""
    if distillation.on_policy is None:
        return
    if not max(alphas) > 0:
        raise ValueError("on_policy steps learn from the teacher alone; set alpha above 0, or remove on_policy")
    if training.fsdp or training.deepspeed is not None:
        raise ValueError(
            "on_policy decodes with the student's weights, which fsdp and deepspeed share among processes; remove "
            "either"
        )


def check_student_fits_labels(student: StudentSpec, distillation: DistillationSpec) -> None:
    """ValueError for projected labels of a head that training would change."""
    if distillation.labels.encoding == "projected" and student.lora is None:
        raise ValueError(
            "encoding projected needs a student whose output head is frozen; train adapters with student.lora, or set "
            "distillation.labels.encoding to exact"
        )
