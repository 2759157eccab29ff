"""The teacher as a run sees it: checked before anything trains, then a source of soft labels."""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from services.contract.lm_head import LmHead
from services.contract.sequences import LabelOptions
from services.contract.settings import Settings
from services.contract.spec import DistillationSpec, RunSpec
from services.contract.teacher_channel import teacher_access
from student_trainer.alignment import verify_token_logprobs
from student_trainer.data import Example
from student_trainer.labels import as_tensor, label_request
from student_trainer.output_head import OutputHead
from student_trainer.teacher_client import TeacherClient, TeacherInfo

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """``lm_head`` is there when labels are exact."""

    client: TeacherClient
    info: TeacherInfo
    options: LabelOptions
    lm_head: LmHead | None

    def verify(self, example: Example) -> None:
        """LabelMismatchError unless the labels of one record fit the log-probabilities that come with them."""
        sequence = label_request(example, id="start-up")
        (scored,) = self.client.score([sequence], self.options)
        difference = verify_token_logprobs(scored, sequence, head=self.lm_head, temperature=self.options.temperature)
        log.info("labels of record %d agree with the teacher to %.1e nats", example.index, difference)

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


def connect_teacher(spec: RunSpec, *, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Teacher:
    """The teacher that ``spec`` names, once it is certain to share the student's tokenizer.

    TeacherUnavailableError where none answers, HandshakeError where it is another, UnsupportedError where it does not
    offer the encoding.
    """
    assert spec.teacher is not None
    address = settings.resolved_teacher_address
    log.info("asking the teacher at %s for %s", address, spec.teacher.model)
    client = TeacherClient(address, access=teacher_access(settings), cache_dir=settings.data_dir / "lm_heads")
    try:
        options = label_options(spec.distillation)
        info = client.handshake(tokenizer, spec.teacher.model, options.encoding)
        # A run that only learns the teacher's decodes needs no labels.
        lm_head = client.fetch_lm_head() if spec.alpha > 0 and options.encoding == "exact" else None
    except BaseException:
        client.close()
        raise
    return Teacher(client=client, info=info, options=options, lm_head=lm_head)


def label_options(spec: DistillationSpec) -> LabelOptions:
    """How a run's labels travel; the server applies the temperature to top_k only."""
    if spec.labels.encoding == "top_k":
        assert spec.labels.k is not None
        return LabelOptions(encoding="top_k", k=spec.labels.k, temperature=spec.temperature)
    return LabelOptions(encoding=spec.labels.encoding)
