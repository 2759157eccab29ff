"""The encoder's weights in eight bits: a quarter of the size, so that they travel with the package.

Every row of a matrix is int8 with one float32 scale (symmetric, by its largest magnitude); vectors stay float32. The
encoder computes in float32 from what they stand for, so that its states are the same on every processor, up to
rounding.

Shapes: R rows of a matrix.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SCALE = ".scale"
LARGEST = 127


def write_eight_bits(weights: dict[str, torch.Tensor], file: Path) -> None:
    """``weights`` by name as one safetensors file; each comes back within half a step of its row's scale.

    OSError for a file that cannot be written.
    """
    kept = {}
    for name, weight in weights.items():
        if weight.ndim < 2:
            kept[name] = weight.float().contiguous()
            continue
        scale_R1 = weight.float().abs().amax(1, keepdim=True) / LARGEST
        # A row of zeros has no scale; any will do.
        scale_R1 = torch.where(scale_R1 > 0, scale_R1, 1.0)
        kept[name] = torch.round(weight.float() / scale_R1).to(torch.int8).contiguous()
        kept[name + SCALE] = scale_R1
    save_file(kept, file)


def read_eight_bits(file: Path) -> dict[str, torch.Tensor]:
    """What the weights stand for, by name, in float32. OSError or SafetensorError for a file that cannot be read."""
    kept = load_file(file)
    return {
        name: value.float() * kept[name + SCALE] if name + SCALE in kept else value
        for name, value in kept.items()
        if not name.endswith(SCALE)
    }
