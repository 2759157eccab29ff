"""Two processes that share a model's weights (FSDP2 over gloo) against one that has them all: started by torchrun.

Each process sees half of the batch. What it prints is what the test looks for.
"""

import copy

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from student_trainer.loss import distillation_loss
from student_trainer.output_head import OutputHead
from student_trainer.student import loss_at_head, output_head
from student_trainer.targets import ExactTargets

VOCAB, ROWS = 90, 96


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for tied in (False, True):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=ROWS,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
        whole = LlamaForCausalLM(config)
        shared = copy.deepcopy(whole)
        if tied:
            shared.tie_weights()
        for layer in shared.model.layers:
            fully_shard(layer, reshard_after_forward=True)
        fully_shard(shared, reshard_after_forward=True)
        ids_BT = torch.randint(VOCAB, (4, 9))
        hidden_NE, weight_RE = torch.randn(4 * 8, 12), torch.randn(ROWS, 12)

        backward(whole, ids_BT, hidden_NE, weight_RE, share=1 / 32)
        rows, positions = slice(2 * rank, 2 * rank + 2), slice(16 * rank, 16 * rank + 16)
        assert shared.lm_head.weight.to_local().shape[0] < ROWS
        # FSDP averages over the processes.
        backward(shared, ids_BT[rows], hidden_NE[positions], weight_RE, share=2 / 32)
        for (name, expected), found in zip(whole.named_parameters(), shared.parameters(), strict=True):
            torch.testing.assert_close(found.grad.full_tensor(), expected.grad, rtol=1e-4, atol=1e-6, msg=name)
    print("the same gradients", flush=True)  # noqa: T201
    dist.destroy_process_group()


def backward(
    model: LlamaForCausalLM, ids_BT: torch.Tensor, hidden_NE: torch.Tensor, weight_RE: torch.Tensor, *, share: float
) -> None:
    def loss_of(hidden_BTD: torch.Tensor) -> torch.Tensor:
        return distillation_loss(
            hidden_BTD[:, :-1].flatten(0, 1),
            token_ids_N=ids_BT[:, 1:].flatten(),
            head=output_head(model),
            vocab_size=VOCAB,
            targets=ExactTargets(hidden_NE=hidden_NE, head=OutputHead(weight_RD=weight_RE)),
            alpha=0.7,
            chunk_size=5,
        ).total

    layer = model.get_output_embeddings()
    (loss_at_head(model, head_layer=layer, loss_of=loss_of, input_ids=ids_BT) * share).backward()


if __name__ == "__main__":
    main()
