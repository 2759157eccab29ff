"""Weights in eight bits against what they were made from."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from services.evaluation.consistency.eight_bits import read_eight_bits, write_eight_bits


def test_weights_come_back_within_half_a_step(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {
        "matrix": torch.randn(7, 300, generator=generator) * torch.logspace(-6, 3, 7)[:, None],
        "half": torch.randn(3, 5, generator=generator).half(),
        "zeros": torch.zeros(2, 4),
        "vector": torch.randn(9, generator=generator),
    }
    write_eight_bits(weights, tmp_path / "weights.safetensors")
    read = read_eight_bits(tmp_path / "weights.safetensors")
    assert read.keys() == weights.keys()
    assert all(value.dtype == torch.float32 for value in read.values())
    torch.testing.assert_close(read["vector"], weights["vector"], rtol=0, atol=0)
    torch.testing.assert_close(read["zeros"], weights["zeros"], rtol=0, atol=0)
    for name in ("matrix", "half"):
        step_R1 = weights[name].float().abs().amax(1, keepdim=True) / 127
        assert ((read[name] - weights[name].float()).abs() <= step_R1 * 0.501).all()


def test_a_row_takes_a_byte_a_weight(tmp_path: Path) -> None:
    write_eight_bits({"matrix": torch.randn(64, 4096)}, tmp_path / "weights.safetensors")
    kept = load_file(tmp_path / "weights.safetensors")
    assert sorted(value.dtype.itemsize * value.numel() for value in kept.values()) == [64 * 4, 64 * 4096]
