"""Weights that the processes of a run share by FSDP2, through accelerate."""

from collections import defaultdict

import torch
from accelerate import DistributedType
from peft import PeftModel
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, TrainingArguments

from services.contract.errors import UnsupportedError
from student_trainer.arguments import processes


def prepare_sharding(
    arguments: TrainingArguments, *, model: PreTrainedModel | PeftModel, matmul_dtype: torch.dtype
) -> None:
    """What the arguments cannot say; to be called between them and the Trainer, which hands it to accelerate.

    UnsupportedError for a model whose layers share weights in a way that FSDP2 does not know.
    """
    if arguments.fsdp_plugin_args is not None:
        _require_separate_weights(model)
        _prepare_fsdp(arguments.fsdp_plugin_args, matmul_dtype=matmul_dtype)


def _prepare_fsdp(plugin_arguments: dict[str, object], *, matmul_dtype: torch.dtype) -> None:
    if matmul_dtype != torch.float32:
        # Gradients of all processes are added up in float32, as they are without sharding; accelerate's own choice is
        # the 16 bits of the weights.
        policy = MixedPrecisionPolicy(param_dtype=matmul_dtype, reduce_dtype=torch.float32)
        plugin_arguments["mixed_precision_policy"] = policy
    if processes().distributed_type == DistributedType.MULTI_CPU:
        # Accelerate knows FSDP2 as something that only GPUs do; torch does it on any device. Of this no more is read
        # than that it may be done, and FSDP takes its place; device and backend are chosen already.
        processes().distributed_type = DistributedType.MULTI_GPU


def _require_separate_weights(model: PreTrainedModel | PeftModel) -> None:
    """Embedding and output head may be one; accelerate puts both into one group."""
    tied = {model.get_input_embeddings(), model.get_output_embeddings()}
    owners: dict[torch.nn.Parameter, set[str]] = defaultdict(set)
    for name, module in model.named_modules():
        for weight in module.parameters(recurse=False):
            owners[weight].add("" if module in tied else name)
    for names in owners.values():
        if len(names) > 1:
            raise UnsupportedError(
                f"{type(model).__name__} has one weight in several layers "
                f"({', '.join(sorted(name or 'the embedding' for name in names))}), which fsdp cannot share out",
                fix="Set training.deepspeed instead, or remove training.fsdp: processes then share the batch alone.",
            )
