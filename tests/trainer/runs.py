"""What tests of whole runs measure them with."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from services.contract.settings import Settings
from services.contract.spec import RunSpec
from services.datasets.reading import load_records
from student_trainer.data import collate, encode_examples

MakeRun = Callable[..., RunSpec]


def environment(settings: Settings) -> dict[str, str]:
    """Of a process that is to have these settings."""
    return os.environ | {
        "SMOOTHKD_DATA_DIR": str(settings.data_dir),
        "SMOOTHKD_TEACHER_ADDRESS": settings.teacher_address,
        "SMOOTHKD_OFFLINE": "true",
        "OMP_NUM_THREADS": "1",
    }


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def assert_same_bits(left: Path, right: Path) -> None:
    expected = weights(right)
    for name, tensor in weights(left).items():
        assert torch.equal(tensor, expected[name]), name


def assert_close_weights(left: Path, right: Path, *, start: Path, share: float) -> None:
    """Apart by at most ``share`` of the way that training went."""
    first, second, before = weights(left), weights(right), weights(start)
    apart = math.sqrt(sum((first[name] - second[name]).square().sum().item() for name in before))
    way = math.sqrt(sum((first[name] - before[name]).square().sum().item() for name in before))
    assert apart <= share * way, f"{apart} of {way}"


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return log_p.exp() * (log_p - log_q)


def mean_divergence(teacher_model: Path, student: Path, records_file: Path, *, divergence: Callable = kl) -> float:
    """Mean KL(teacher || student), or other ``divergence`` per token of the vocabulary, over response tokens, from
    transformers' own logits in float64.
    """
    from services.contract.spec import DatasetSpec

    tokenizer = AutoTokenizer.from_pretrained(student)
    batch = collate(encode_examples(load_records(DatasetSpec(path=str(records_file))), tokenizer, max_length=256))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logprobs = []
    for directory in (teacher_model, student):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
        with torch.no_grad():
            logits = model(**inputs).logits.flatten(0, 1)[batch["predictor_N"], : len(tokenizer)]
        logprobs.append(logits.log_softmax(dim=1))
    p, q = logprobs
    return divergence(p, q).sum(dim=1).mean().item()


def stop_after(asked: int) -> Callable[[], bool]:
    """Says stop once it was asked so often; it is asked after every record."""
    left = iter(range(asked))
    return lambda: next(left, None) is None


def plainly_trained(spec: RunSpec, model_directory: Path) -> PreTrainedModel:
    """Supervised fine-tuning as anybody would write it: AdamW on transformers' own token mean, a seeded order."""
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    examples = encode_examples(load_records(spec.dataset), tokenizer, max_length=spec.training.max_length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, weight_decay=0.0)
    for epoch in range(spec.training.epochs):
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(spec.seed + epoch)).tolist()
        for start in range(0, len(order), spec.batch_size):
            batch = collate([examples[index] for index in order[start : start + spec.batch_size]])
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1, : len(tokenizer)].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), spec.training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    return model.requires_grad_(False)


def sharp_model(directory: Path, *, seed: int, hidden_size: int, padded_rows: int, factor: float) -> Path:
    """A tiny random model whose logits are ``factor`` times as large: worth learning."""
    import torch
    from transformers import AutoModelForCausalLM

    from services.models.tiny import make_tiny_model

    make_tiny_model(directory, seed=seed, hidden_size=hidden_size, padded_rows=padded_rows)
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model.lm_head.weight.mul_(factor)
    model.save_pretrained(directory)
    return directory
