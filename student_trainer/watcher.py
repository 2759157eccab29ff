"""What watches the training loop: metrics and progress go out, a stop comes in, whole checkpoints are marked."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from services.contract.records import MetricPoint
from services.contract.spec import RunSpec
from student_trainer.arguments import processes
from student_trainer.chunk_loss import OBSERVED
from student_trainer.progress import Progress
from student_trainer.run_directory import RunDirectory

METRICS = (
    "loss",
    "hard_loss",
    "soft_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "label_wait_seconds",
    "label_cache_hits",
    *OBSERVED,
    "held_out_loss",
    "held_out_accuracy",
    "held_out_ece",
    "peak_memory_gib",
    "mfu",
    "on_policy_share",
    "decoded_tokens",
    "epoch",
)


class Watcher(TrainerCallback):
    """``should_stop`` is asked after every micro-batch: a stop saves a checkpoint of the last whole step."""

    def __init__(
        self,
        directory: RunDirectory,
        *,
        spec: RunSpec,
        progress: Progress,
        on_metrics: Callable[[Sequence[MetricPoint]], None],
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.stopped = False
        self._directory = directory
        self._spec = spec
        self._progress = progress
        self._on_metrics = on_metrics
        self._on_progress = on_progress
        self._should_stop = should_stop
        self._first_step = 0
        self._random_state = torch.get_rng_state()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._first_step = state.global_step
        if state.is_world_process_zero:
            self._progress.update(state.global_step)

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # One of several processes cannot stop while the others wait for its share of the step.
        if args.device.type == "cpu" and args.world_size == 1 and self._should_stop():
            # The weights are still those of the last step; what this one drew at random must not count.
            torch.set_rng_state(self._random_state)
            self._stop(state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._random_state = torch.get_rng_state()
        if state.is_world_process_zero:
            self._on_progress(state.global_step / state.max_steps)
        if state.global_step >= state.max_steps:
            # The final model is about to be written: a checkpoint of the same weights would only cost time.
            control.should_save = False
        elif self._agree_to_stop():
            self._stop(state, control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not logs or not state.is_world_process_zero or not logs.keys() & {"tokens_per_second", "held_out_ece"}:
            return
        if "tokens_per_second" in logs:
            note = f"loss {logs['loss']:.3f}, {logs['tokens_per_second']:.0f} tokens/s"
            self._progress.update(state.global_step, note=note)
        self._on_metrics(
            [
                MetricPoint(name=name, step=state.global_step, value=float(logs[name]))
                for name in METRICS
                if name in logs and not (name == "epoch" and "train_loss" in logs)
            ]
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # Each process writes its own random state.
        processes().wait_for_everyone()
        if state.is_world_process_zero:
            self._directory.mark_checkpoint(state.global_step, self._spec)

    def _agree_to_stop(self) -> bool:
        """Whether any process is to stop: all do so after the same step."""
        ranks = processes()
        if ranks.num_processes == 1:
            return self._should_stop()
        stopping = torch.tensor(float(self._should_stop()), device=ranks.device)
        torch.distributed.all_reduce(stopping)
        return stopping.item() > 0

    def _stop(self, state: TrainerState, control: TrainerControl) -> None:
        self.stopped = True
        control.should_training_stop = True
        # Without a step since the start, the checkpoint that was started from stands.
        control.should_save = state.global_step > self._first_step


@contextmanager
def stop_on_signals(should_stop: Callable[[], bool] = lambda: False) -> Iterator[Callable[[], bool]]:
    """Whether to stop: because ``should_stop`` says so, or SIGTERM or Ctrl-C came.

    A second signal has its usual effect. Signals reach the main thread only; elsewhere ``should_stop`` alone counts.
    """
    came = threading.Event()
    before: dict[signal.Signals, Any] = {}

    def note(number: int, _frame: object) -> None:
        came.set()
        signal.signal(number, before[signal.Signals(number)])

    if threading.current_thread() is threading.main_thread():
        for stop_signal in (signal.SIGTERM, signal.SIGINT):
            before[stop_signal] = signal.signal(stop_signal, note)
    try:
        yield lambda: came.is_set() or should_stop()
    finally:
        for stop_signal, handler in before.items():
            signal.signal(stop_signal, handler)
