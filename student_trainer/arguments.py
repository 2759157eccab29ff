"""A run's specification in the words of transformers' Trainer."""

import importlib.util
import math
import os
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from services.contract.errors import MissingExtraError, SpecError, UnsupportedError
from services.contract.spec import RunSpec
from student_trainer.deepspeed_config import load_deepspeed_config

MATMUL_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MOST_POINTS = 1000
"""Points of a metric's curve; runs of more steps log every few."""


def training_arguments(spec: RunSpec, checkpoints: Path, *, steps: int) -> TrainingArguments:
    """``steps``: what ``optimizer_steps`` says. SpecError for weights that cannot be shared as asked, UnsupportedError
    for fp16 without a GPU, MissingExtraError for a tracker or DeepSpeed that is not installed.
    """
    training = spec.training
    if training.precision == "fp16" and training_device().type != "cuda":
        raise UnsupportedError("precision fp16 needs a GPU", fix="Set training.precision to fp32 or bf16.")
    micro_batch_size = micro_batch(spec)
    for sharding in ("fsdp", "deepspeed"):
        if getattr(training, sharding) and processes().num_processes == 1:
            raise SpecError(
                f"{sharding} shares a model among several processes, and there is one", fix="Set training.processes."
            )
    if training.deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise MissingExtraError(
            "training.deepspeed needs DeepSpeed, which is not installed", fix="pip install deepspeed"
        )
    for tracker in training.report_to:
        found = importlib.util.find_spec(tracker)
        # What a tracker leaves in a folder of its own name is no package, though Python would take it for one.
        if found is None or found.origin is None:
            raise MissingExtraError(
                f"training.report_to names {tracker}, which is not installed",
                fix=f"Run pip install {tracker}, or leave it out; the dashboard shows the same curves.",
            )
    accumulated = spec.batch_size // (micro_batch_size * processes().num_processes)
    # The library would write beside the checkpoints, which go when the run has ended.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(checkpoints.parent / "tensorboard")
    return TrainingArguments(
        output_dir=str(checkpoints),
        seed=spec.seed,
        data_seed=spec.seed,
        num_train_epochs=training.epochs,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulated,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=training.lr_scheduler,
        warmup_steps=math.ceil(steps * training.warmup_ratio),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        bf16=training.precision == "bf16",
        fp16=training.precision == "fp16",
        use_cpu=training_device().type == "cpu",
        gradient_checkpointing=training.gradient_checkpointing,
        fsdp=training.fsdp or None,  # type: ignore[arg-type]  # transformers says str, and means bool
        fsdp_config={"version": 2, "reshard_after_forward": True} if training.fsdp else None,
        deepspeed=training.deepspeed
        and load_deepspeed_config(
            training.deepspeed,
            of_the_run={
                "train_batch_size": spec.batch_size,
                "train_micro_batch_size_per_gpu": micro_batch_size,
                "gradient_accumulation_steps": accumulated,
                "gradient_clipping": training.max_grad_norm,
            },
            precision=training.precision,
        ),
        save_strategy="steps",
        save_steps=training.checkpoint_steps,
        # RunDirectory drops old checkpoints, once the newest is marked whole.
        save_total_limit=None,
        logging_strategy="steps",
        logging_steps=math.ceil(steps / MOST_POINTS),
        # A loss that is not finite stops the run; the library would show the mean of the others instead.
        logging_nan_inf_filter=False,
        # Of the others the library would know neither the run's settings nor how it came out: trackers.py.
        report_to=["tensorboard"] if "tensorboard" in training.report_to else "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=training_device().type == "cuda",
    )


def micro_batch(spec: RunSpec) -> int:
    """Records that go through the model at once, in each process.

    Without ``micro_batch_size`` that is all of them, but on a CPU one unless they are packed: there nothing is gained
    by more, and padding costs a quarter.
    """
    ranks: int = processes().num_processes
    if spec.batch_size % ranks:
        raise SpecError(
            f"batch_size {spec.batch_size} cannot be shared by {ranks} processes",
            fix=f"Choose a multiple of {ranks}, or fewer processes.",
        )
    share = spec.batch_size // ranks
    one_by_one = training_device().type == "cpu" and not spec.training.packing
    size = min(spec.training.micro_batch_size or (1 if one_by_one else share), share)
    if share % size:
        raise SpecError(
            f"micro_batch_size {size} does not divide the {share} records of each process",
            fix="Choose a divisor.",
        )
    return size


def optimizer_steps(spec: RunSpec, *, examples: int) -> int:
    """Optimizer steps of the whole run."""
    return math.ceil(examples / spec.batch_size) * spec.training.epochs


def training_device() -> torch.device:
    """Where this process trains."""
    device: torch.device = processes().device
    return device


def processes() -> PartialState:
    """This process among those that a launcher started with it."""
    # Without a GPU the processes of a launcher find each other only when told that they are to use the CPU.
    return PartialState(cpu=not torch.cuda.is_available())
