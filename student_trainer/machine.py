"""How a training process uses its machine: memory at its peak, and the share of a GPU's arithmetic."""

import resource
import sys

import torch

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}
"""Dense bfloat16 operations per second, from the makers' data sheets; the first name that a device's holds counts."""


def peak_memory_gib(device: torch.device) -> float:
    """The most this process has held so far: on a GPU what torch allocated there, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return resident / (2**30 if sys.platform == "darwin" else 2**20)


def flops_per_token(model: torch.nn.Module) -> float:
    """Operations of forward and backward pass per token: 6 for every trained parameter, 4 for every frozen one.

    PaLM's count (arXiv:2204.02311, appendix B) without its term for attention; frozen weights need no gradient.
    """
    return float(sum((6 if weight.requires_grad else 4) * weight.numel() for weight in model.parameters()))


def model_flops_utilization(*, flops_per_token: float, tokens_per_second: float, devices: int) -> float | None:
    """Model FLOPs utilisation (MFU), 0 to 1, of all GPUs together; None without one whose peak is known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    peak = next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)
    return None if peak is None else flops_per_token * tokens_per_second / (devices * peak)
