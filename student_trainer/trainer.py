"""The training step: transformers' Trainer with the fused distillation loss in it.

Checkpoints, resume, mixed precision, gradient accumulation and data parallelism stay the library's.
Shape suffixes: B sequences, T tokens, N response tokens, D hidden size.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from services.contract.distillation_spec import Divergence
from services.contract.errors import TrainingError
from student_trainer.alignment import blaming_teacher
from student_trainer.batch_alignment import require_aligned
from student_trainer.data import Collate, Example, collate, model_inputs
from student_trainer.held_out import measure_held_out
from student_trainer.labels import LabelPrefetcher, mixed_targets, soft_targets, universal_targets
from student_trainer.log_window import LogWindow
from student_trainer.look_ahead import LookAhead
from student_trainer.loss import LossSums, distillation_loss
from student_trainer.machine import flops_per_token, model_flops_utilization, peak_memory_gib
from student_trainer.observables import Observables
from student_trainer.on_policy import OnPolicy
from student_trainer.output_head import OutputHead
from student_trainer.sharding import prepare_sharding
from student_trainer.student import loss_at_head, output_head
from student_trainer.targets import ExactTargets, SoftTargets

STEPS_AHEAD = 4
"""Optimizer steps whose labels are asked for before they are needed."""


@dataclass(frozen=True, kw_only=True)
class TeacherShare:
    """What one teacher counts in the mean of all, and its output head where labels need it."""

    weight: float
    head: OutputHead | None


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised; ``labels`` is None for supervised fine-tuning.

    ``teachers``: by name, in the order of ``labels``.
    ``on_policy``: the steps that learn from the student's own responses; None where none does.
    """

    vocab_size: int
    matmul_dtype: torch.dtype
    alpha: float = 0.0
    temperature: float = 1.0
    divergence: Divergence = "cross_entropy"
    beta: float = 0.5
    labels: LabelPrefetcher | None = None
    teachers: Mapping[str, TeacherShare] = field(default_factory=dict)
    on_policy: OnPolicy | None = None
    chunk_size: int | None = None


class DistillationTrainer(Trainer):
    """Both loss terms are sums over response tokens divided by one count over micro-batches and ranks of a step."""

    def __init__(
        self,
        *,
        model: PreTrainedModel | PeftModel,
        args: TrainingArguments,
        examples: Sequence[Example],
        held_out: Sequence[Example] = (),
        objective: Objective,
        callbacks: list[TrainerCallback],
        collate: Collate = collate,
        held_out_collate: Collate = collate,
    ) -> None:
        # One process drives one device; without this the library wraps the model for all GPUs it sees.
        args._n_gpu = min(args.n_gpu, 1)
        prepare_sharding(args, model=model, matmul_dtype=objective.matmul_dtype)
        super().__init__(model=model, args=args, train_dataset=examples, data_collator=collate, callbacks=callbacks)
        # The library counts num_items_in_batch for models that take it, and then trusts the loss to be scaled.
        self.model_accepts_loss_kwargs = True
        self._student = model
        self._objective = objective
        self._examples = {example.index: example for example in examples}
        self._head_layer: torch.nn.Module = model.get_output_embeddings()
        self._collate = collate
        self._ahead: LookAhead | None = None
        self._window = LogWindow(self.accelerator.device)
        self._observables = Observables(self.accelerator.device)
        self._held_out = held_out
        self._held_out_collate = held_out_collate
        # A token passes through one half of an encoder-decoder or the other.
        self._flops_per_token = None if model.config.is_encoder_decoder else flops_per_token(model)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The next optimizer step's micro-batches; labels of the steps after it are asked for meanwhile."""
        labels = self._objective.labels
        if labels is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._ahead is None or self._ahead.batches is not epoch_iterator:
            self._ahead = self._look_ahead(epoch_iterator, labels)
        return super().get_batch_samples(self._ahead, num_batches, device)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's share of the step's loss. TrainingError when it is not finite."""
        assert num_items_in_batch is not None, "the step's response tokens are counted before it"
        loss = loss_at_head(
            model,
            head_layer=self._head_layer,
            loss_of=lambda hidden_BTD: self._loss_sums(hidden_BTD, inputs).total,
            **model_inputs(inputs),
        )
        # Data parallelism averages gradients over ranks; the count is already over all of them.
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        loss = loss * (ranks / num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def _loss_sums(self, hidden_BTD: Tensor, inputs: dict[str, Any]) -> LossSums:
        objective = self._objective
        sums = distillation_loss(
            hidden_BTD.flatten(0, 1).index_select(0, inputs["predictor_N"]),
            token_ids_N=inputs["learnt_N"],
            head=output_head(self._student),
            vocab_size=objective.vocab_size,
            targets=self._targets(inputs),
            alpha=objective.alpha,
            temperature=objective.temperature,
            divergence=objective.divergence,
            beta=objective.beta,
            hard_term="on_policy" not in inputs,
            chunk_size=objective.chunk_size,
            matmul_dtype=objective.matmul_dtype,
            observe=(self.state.global_step + 1) % self.args.logging_steps == 0,
        )
        if not math.isfinite(sums.total.item()):
            raise self._not_finite("loss", f", records {sorted(inputs['record_B'].tolist())}")
        decoded = len(inputs["record_B"]) if "on_policy" in inputs else 0
        tokens = inputs["attention_mask"].sum() + (sums.tokens if "decoder_input_ids" in inputs else 0)
        self._window.add(sums, tokens=tokens, decoded=decoded)
        self._observables.add(sums)
        return sums

    def whole_weights(self) -> dict[str, Tensor] | None:
        """The weights of a model that processes share, gathered in the first of them; all have to ask.

        None where each process has them all.
        """
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return None
        gathered: dict[str, Tensor] = self.accelerator.get_state_dict(self.model_wrapped)
        # Models that are loaded from here on are to be whole.
        unset_hf_deepspeed_config()
        return gathered

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """What the library logs, with both terms, the speed and the wait for labels since the last time."""
        if "loss" in logs:
            labels = self._objective.labels
            sums = self.accelerator.reduce(self._window.sums, reduction="sum").tolist()
            logs |= self._window.metrics(sums, alpha=self._objective.alpha)
            if self._objective.on_policy:
                logs |= self._window.on_policy_metrics(sums)
            if labels:
                logs["label_wait_seconds"] = labels.waited_seconds
                logs["label_cache_hits"] = labels.taken_from_cache / max(labels.taken, 1)
                labels.waited_seconds, labels.taken, labels.taken_from_cache = 0.0, 0, 0
            else:
                # Not 0: without a teacher there is no such term.
                del logs["soft_loss"]
            logs |= self._own_metrics(tokens_per_second=logs["tokens_per_second"])
            self._window.restart()
        ended = "train_loss" in logs and self.state.global_step >= self.state.max_steps
        if self._held_out and (ended or ("loss" in logs and self._is_due())):
            logs |= self._measure_held_out()
        super().log(logs, start_time)

    def _own_metrics(self, *, tokens_per_second: float) -> dict[str, float]:
        metrics = self._observables.means(self.accelerator.reduce(self._observables.sums, reduction="sum").tolist())
        metrics["peak_memory_gib"] = peak_memory_gib(self.accelerator.device)
        if self._flops_per_token is None:
            return metrics
        utilization = model_flops_utilization(
            flops_per_token=self._flops_per_token,
            tokens_per_second=tokens_per_second,
            devices=self.accelerator.num_processes,
        )
        return metrics | ({} if utilization is None else {"mfu": utilization})

    def _is_due(self) -> bool:
        """Held-out records are measured with every checkpoint, and once more in the end."""
        logged, every = self.args.logging_steps, int(self.args.save_steps)
        step = self.state.global_step
        return step // every > max(step - logged, 0) // every and step < self.state.max_steps

    def _measure_held_out(self) -> dict[str, float]:
        with self.compute_loss_context_manager():
            return measure_held_out(
                self.model_wrapped,
                head_layer=self._head_layer,
                head=lambda: output_head(self._student),
                examples=self._held_out,
                collate=self._held_out_collate,
                vocab_size=self._objective.vocab_size,
                batch_size=self.args.per_device_train_batch_size,
                device=self.accelerator.device,
            )

    def _look_ahead(self, batches: Iterator[dict[str, Any]], labels: LabelPrefetcher) -> LookAhead:
        accumulated, begun = self.args.gradient_accumulation_steps, self.state.global_step
        on_policy = self._objective.on_policy
        return LookAhead(
            batches,
            labels=labels,
            examples=self._examples,
            depth=STEPS_AHEAD * accumulated,
            # An epoch, or what is left of it, begins with a step's first micro-batch.
            step_of=lambda count: begun + count // accumulated,
            chooses=on_policy.chooses if on_policy else lambda step: False,
            decode=self._decode,
        )

    def _decode(self, examples: Sequence[Example], step: int) -> tuple[list[Example], dict[str, Any]]:
        on_policy = self._objective.on_policy
        assert on_policy is not None
        with self.compute_loss_context_manager():
            decoded = on_policy.decode(self._student, examples, step=step)
        return decoded, self._collate(decoded)

    def _targets(self, inputs: dict[str, Any]) -> SoftTargets | None:
        labels = self._objective.labels
        if labels is None:
            return None
        taken = labels.take(inputs["ticket"])
        teachers, parts = self._objective.teachers, []
        for name, scored in taken.scored.items():
            head = teachers[name].head
            part = soft_targets([one.labels for one in scored], teacher_head=head, device=self.accelerator.device)
            if isinstance(part, ExactTargets):
                with blaming_teacher(name):
                    require_aligned(part, scored, taken.sequences)
            parts.append(part)
        targets = mixed_targets(parts, weights=[teachers[name].weight for name in taken.scored])
        examples = [self._examples[index] for index in inputs["record_B"].tolist()]
        return universal_targets(targets, examples) if examples[0].reading else targets

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # With float16 an infinite norm is how the loss scale is found; the library skips such steps.
        if not math.isfinite(float(grad_norm)) and self.accelerator.scaler is None:
            raise self._not_finite("gradient", "")
        return grad_norm

    def _not_finite(self, what: str, where: str) -> TrainingError:
        return TrainingError(
            f"the {what} is not finite at step {self.state.global_step + 1}{where}",
            fix="Lower the learning rate or max_grad_norm, or train in bf16 or fp32. Earlier checkpoints are whole.",
        )
