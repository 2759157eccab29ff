"""What reaches vLLM besides the model: how it is spread over GPUs and how much memory it may take."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class VllmOptions:
    """Named as vLLM's own options. ``generation`` starts a second engine for sequence-level distillation.

    ``max_lora_rank``: the largest of LoRA adapters that may be loaded later; one that is served from the start is
    counted in anyhow. ``gpu_memory_utilization`` is shared by both engines and leaves room for the output head, which
    this process holds on the first GPU.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    quantization: str | None = None
    gpu_memory_utilization: float = 0.8
    generation: bool = False
    max_lora_rank: int = 0
