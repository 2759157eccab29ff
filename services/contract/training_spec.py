"""How students are trained: what all runs of a sweep have in common."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from services.contract.evaluation_spec import Spec


class TrainingSpec(Spec):
    """What all runs of a sweep train alike. ``max_length``, in tokens, bounds prompt plus response.

    ``micro_batch_size`` records go through the model at once; None means the whole batch, or one
    record on a CPU without packing. ``loss_chunk``: response positions whose logits exist at a time; None fits them to
    the vocabulary.
    ``packing`` puts several records of a micro-batch into one row of ``max_length``, each unseen by the others, so that
    less is padding; batches still count records.
    ``checkpoint_steps``: optimizer steps between checkpoints, of which the newest ``keep_checkpoints`` stay.
    ``held_out``: that many records at the data set's end are not learnt; calibration is measured on them instead.

    ``processes`` share the records of each batch, each with a GPU of its own where there are any. ``fsdp`` also shares
    weights, gradients and optimizer among them (FSDP2); ``deepspeed``: a DeepSpeed configuration to use instead.

    ``report_to``: trackers that get the run's curves besides the store; their own environment variables say where they
    keep them.
    """

    epochs: Annotated[int, Field(ge=1)] = 1
    max_length: Annotated[int, Field(ge=8)] = 1024
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    loss_chunk: Annotated[int, Field(ge=1)] | None = None
    packing: bool = False
    gradient_checkpointing: bool = False
    lr_scheduler: Literal["linear", "cosine", "constant"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    checkpoint_steps: Annotated[int, Field(ge=1)] = 200
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    held_out: Annotated[int, Field(ge=0)] = 0
    processes: Annotated[int, Field(ge=1)] = 1
    fsdp: bool = False
    deepspeed: Annotated[str, Field(min_length=1)] | None = None
    report_to: tuple[Literal["wandb", "mlflow", "tensorboard", "trackio"], ...] = ()

    @model_validator(mode="after")
    def _one_way_to_shard(self) -> "TrainingSpec":
        if self.fsdp and self.deepspeed is not None:
            raise ValueError("fsdp and deepspeed both share weights among processes; choose one")
        return self


def check_batches(training: TrainingSpec, batch_sizes: tuple[int, ...]) -> None:
    """ValueError for a batch size that processes and micro-batches do not divide."""
    processes, micro_batch_size = training.processes, training.micro_batch_size
    for batch_size in batch_sizes:
        if batch_size % processes:
            raise ValueError(
                f"{processes} processes cannot share batch_size {batch_size} evenly; "
                "choose batch sizes that are multiples of training.processes"
            )
        share = batch_size // processes
        if micro_batch_size is not None and share % micro_batch_size and share > micro_batch_size:
            whose = f"batch_size {batch_size}" if processes == 1 else f"each process's share of {share} records"
            raise ValueError(
                f"micro_batch_size {micro_batch_size} does not divide {whose}; choose a divisor of every batch size"
            )
