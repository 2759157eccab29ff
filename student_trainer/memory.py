"""When memory runs out: what a run's specification can do about it."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from services.contract.errors import TrainingError
from services.contract.spec import RunSpec
from student_trainer.arguments import micro_batch

OUT_OF_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|CUBLAS_STATUS_ALLOC_FAILED", re.I)
"""How torch says it in a plain RuntimeError: the processor's allocator, and libraries of the GPU."""


@contextmanager
def memory_advised(spec: RunSpec, *, where: Callable[[], str]) -> Iterator[None]:
    """TrainingError with advice in place of any error that says memory ran out; ``where``: in words."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(f"memory ran out {where()}: {what}", fix=_advice(spec)) from error


def _advice(spec: RunSpec) -> str:
    training = spec.training
    size = micro_batch(spec)
    advice = []
    if size > 1:
        advice.append(f"lower micro_batch_size (now {size})")
    chunk = f"now {training.loss_chunk}" if training.loss_chunk else "say 64"
    advice += [f"lower max_length (now {training.max_length})", f"lower loss_chunk ({chunk})"]
    if not training.gradient_checkpointing:
        advice.append("set gradient_checkpointing: true")
    if training.precision == "fp32":
        advice.append("set precision: bf16")
    else:
        advice.append(f"precision is {training.precision} already; weights and optimizer stay in fp32")
    advice.append("train adapters (student.lora)" if spec.student.lora is None else "choose a smaller student")
    return f"Under training: {'; '.join(advice)}."
