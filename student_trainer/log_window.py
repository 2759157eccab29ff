"""The losses, the speed and the share of on-policy steps between two logs of a run."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from student_trainer.loss import LossSums


class LogWindow:
    """Sums since the last log, kept on the device: hard loss, soft loss, response tokens, all tokens; of batches that
    the student decoded response tokens, records and how many there were; micro-batches.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        self.sums = torch.zeros(8, dtype=torch.float64, device=self._device)
        self._started = time.monotonic()

    def add(self, sums: LossSums, *, tokens: Tensor, decoded: int) -> None:
        """``decoded``: records of an on-policy batch, 0 for any other."""
        own = (sums.tokens, decoded, 1) if decoded else (0, 0, 0)
        counts = torch.tensor([sums.tokens, *own, 1], dtype=self.sums.dtype, device=self._device)
        terms = torch.stack([sums.hard.detach(), sums.soft.detach()])
        self.sums += torch.cat([terms, counts[:1], tokens.unsqueeze(0), counts[1:]])

    def metrics(self, sums: Sequence[float], *, alpha: float) -> dict[str, float]:
        hard, soft, response_tokens, tokens, decoded_tokens, *_ = sums
        learnt_tokens = response_tokens - decoded_tokens
        return {
            "loss": (hard + alpha * soft) / response_tokens,
            # None of the tokens may have been learnt: then there is no such term.
            **({"hard_loss": hard / learnt_tokens} if learnt_tokens else {}),
            "soft_loss": soft / response_tokens,
            "tokens_per_second": tokens / max(time.monotonic() - self._started, 1e-9),
        }

    def on_policy_metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """The share of steps that the student decoded for, and the mean length of its responses in tokens."""
        *_, decoded_tokens, records, on_policy, micro_batches = sums
        length = {"decoded_tokens": decoded_tokens / records} if records else {}
        return {"on_policy_share": on_policy / micro_batches, **length}
