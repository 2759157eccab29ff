"""Products with heads of several blocks, against float64."""

import pytest
import torch

from services.models import head_product
from services.models.head_product import float32_blocks, float32_product


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows of a head of width 12, so that 100 rows are many blocks and a ragged one."""
    monkeypatch.setattr(head_product, "_BLOCK_ELEMENTS", 7 * 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_those_of_the_rounded_values(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden_CD, weight_VD = torch.randn(9, 12).to(dtype), torch.randn(100, 12).to(dtype)
    product_CV = float32_product(hidden_CD, weight_VD)
    assert product_CV.dtype == torch.float32
    torch.testing.assert_close(product_CV.double(), hidden_CD.double() @ weight_VD.double().T, atol=1e-5, rtol=0)


def test_blocks_are_all_rows_in_their_order() -> None:
    weight_VD = torch.randn(100, 12).to(torch.bfloat16)
    blocks = list(float32_blocks(weight_VD))
    assert [len(block) for block in blocks] == [7] * 14 + [2]
    assert torch.equal(torch.cat(blocks), weight_VD.float())
