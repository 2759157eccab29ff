"""The teacher as a run sees it: checked before anything trains, then a source of soft labels."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from services.contract.distillation_spec import DistillationSpec
from services.contract.errors import HandshakeError, TeacherError
from services.contract.lm_head import LmHead
from services.contract.sequences import LabelOptions, TokenSequence
from services.contract.settings import Settings
from services.contract.soft_labels import ScoredSequence
from services.contract.spec import RunSpec
from services.contract.teacher_addresses import require_own_addresses
from services.contract.teacher_channel import teacher_access
from student_trainer.alignment import blaming_teacher, verify_token_logprobs
from student_trainer.data import Example
from student_trainer.finetuned import finetuned_directory
from student_trainer.label_source import LabelSource
from student_trainer.labels import as_array, as_tensor, label_request
from student_trainer.loss import require_projectable
from student_trainer.output_head import OutputHead
from student_trainer.readings import teacher_tokenizer
from student_trainer.teacher_client import TeacherClient
from student_trainer.teacher_info import TeacherInfo

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """``name`` is the run's; ``source`` gives its labels; ``lm_head`` is there when they are exact."""

    name: str
    source: LabelSource
    info: TeacherInfo
    options: LabelOptions
    lm_head: LmHead | None

    def verify(self, example: Example) -> None:
        """LabelMismatchError unless the labels of one record fit the log-probabilities that come with them."""
        sequence = label_request(example, id="start-up")
        (scored,) = self.source.score([sequence], self.options)
        log.info("labels of record %d agree with the teacher to %.1e nats", example.index, self.check(scored, sequence))

    def check(self, scored: ScoredSequence, sequence: TokenSequence) -> float:
        """The difference in nats between labels and the log-probabilities beside them; LabelMismatchError beyond what
        rounding explains.
        """
        with blaming_teacher(self.name):
            return verify_token_logprobs(scored, sequence, head=self.lm_head, temperature=self.options.temperature)

    def projecting(self, head: OutputHead, *, vocab_size: int, dtype: torch.dtype) -> "Teacher":
        """The teacher whose labels are means of this student's ``head``, in the type that the loss multiplies with.

        UnsupportedError for a head that training changes, or whose logits are capped.
        """
        require_projectable(head)
        weight_VD = as_array(head.weight_RD[:vocab_size].to(dtype))
        bias_V = None if head.bias_R is None else as_array(head.bias_R[:vocab_size].to(dtype))
        fingerprint = self.source.use_student_head(LmHead(weight_VD=weight_VD, bias_V=bias_V))
        return replace(self, options=replace(self.options, student_head=fingerprint))

    def head_on(self, device: torch.device, *, dtype: torch.dtype) -> OutputHead | None:
        """The teacher's output head beside the student, in the type that the loss multiplies with."""
        if self.lm_head is None:
            return None
        bias_V = self.lm_head.bias_V
        return OutputHead(
            weight_RD=as_tensor(np.array(self.lm_head.weight_VD)).to(device, dtype),
            bias_R=None if bias_V is None else as_tensor(np.array(bias_V)).to(device, dtype),
            logit_scale=self.lm_head.logit_scale,
            soft_cap=self.lm_head.soft_cap,
        )


def connect_teachers(spec: RunSpec, *, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[Teacher]:
    """All teachers that ``spec`` names, the first one first, each as ``connect_teacher`` has it.

    InvalidInputError where two of them are looked for at one address, which serves one at a time.
    """
    require_own_addresses(spec.teacher, settings)
    teachers: list[Teacher] = []
    try:
        for one in spec.single_teachers:
            teachers.append(connect_teacher(one, tokenizer=tokenizer, settings=settings))
    except BaseException:
        for teacher in teachers:
            teacher.source.close()
        raise
    return teachers


def connect_teacher(spec: RunSpec, *, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Teacher:
    """The run's first teacher, once it is certain to share the student's tokenizer, or to have that of the teacher's
    model where the run allows for another.

    TeacherUnavailableError where none answers, HandshakeError where it is another, UnsupportedError where it does not
    offer the encoding.
    """
    assert spec.teacher is not None
    client = open_client(spec, tokenizer=tokenizer, settings=settings)
    try:
        options = label_options(spec.distillation)
        # A run that only learns the teacher's decodes needs no labels.
        lm_head = client.fetch_lm_head() if spec.alpha > 0 and options.encoding == "exact" else None
        info = client.describe()
        return Teacher(name=spec.teacher.model, source=client, info=info, options=options, lm_head=lm_head)
    except BaseException:
        client.close()
        raise


def open_client(spec: RunSpec, *, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> TeacherClient:
    """A connection to the teacher that ``spec`` names, with the checks and errors of ``connect_teacher``.

    The teacher is made to serve the weights that this run learns from, and again whenever students of others have had
    theirs loaded meanwhile.
    """
    assert spec.teacher is not None
    tokenizer = teacher_tokenizer(spec, tokenizer=tokenizer, settings=settings)
    address = settings.address_of(spec.teacher.model)
    log.info("asking the teacher at %s for %s", address, spec.teacher.model)
    client = TeacherClient(address, access=teacher_access(settings), cache_dir=settings.data_dir / "lm_heads")
    encoding = spec.distillation.labels.encoding
    try:
        own = _introduced(client, spec, tokenizer)
        finetuned = finetuned_directory(spec, settings)
        client.load_model(own.model if finetuned is None else _served_path(finetuned, settings))
        client.handshake(tokenizer, encoding=encoding)
    except BaseException:
        client.close()
        raise
    return client


def _introduced(client: TeacherClient, spec: RunSpec, tokenizer: PreTrainedTokenizerBase) -> TeacherInfo:
    assert spec.teacher is not None
    try:
        return client.handshake(tokenizer, spec.teacher.model, spec.distillation.labels.encoding)
    except HandshakeError as error:
        if spec.distillation.cross_tokenizer is None or "difference.0" not in error.details:
            raise
        raise HandshakeError(
            f"the tokenizer of {spec.teacher.model} here is not the one at the teacher: "
            f"{error.details['difference.0']}",
            fix="Name the very model that the teacher serves as teacher.model; its tokenizer is read here, too.",
            details=error.details,
        ) from None


def _served_path(finetuned: Path, settings: Settings) -> str:
    """As the teacher finds it in the data directory, wherever that is mounted there."""
    model = finetuned / "model"
    if not model.is_dir():
        raise TeacherError(
            f"the teacher has not been fine-tuned: there is no {model}",
            fix="Sweeps do that first, and so does `smoothkd train`; let teacher and workers share one data directory.",
        )
    return str(model.relative_to(settings.data_dir))


def label_options(spec: DistillationSpec) -> LabelOptions:
    """How a run's labels travel; of labels that give the whole distribution the loss applies the temperature."""
    labels = spec.labels
    by_server = labels.encoding not in ("exact", "full")
    return LabelOptions(
        encoding=labels.encoding,
        k=labels.k or 0,
        draws=labels.draws or 0,
        seed=labels.seed,
        temperature=spec.temperature if by_server else 1.0,
    )
