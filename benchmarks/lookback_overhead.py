"""Time of greedy decoding with lookback ratios measured, as a ratio to plain decoding; the target is 1.5.

SmolLM2-135M-Instruct answers a long prompt; both ways write the same tokens. Also teacher-forced: reading a given
text with ratios measured, as a ratio to the plain forward pass.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.report import report
from services.contract.settings import Settings
from services.evaluation.lookback.features import load_lens_model
from services.evaluation.lookback.measure import Prompt, generate_measured, measure_padded

TARGET = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--prompt-tokens", type=int, default=400)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model: Any = load_lens_model(options.model, settings=Settings()).model
    rows = []
    for batch_size in options.batch_sizes:
        prompts = make_prompts(model, batch_size, options.prompt_tokens)
        new_tokens = options.new_tokens
        plain, measured = compare(
            partial(decode, model, prompts, new_tokens),
            partial(generate_measured, model, prompts, max_new_tokens=new_tokens, pad_id=0, end_ids=[]),
            repeats=options.repeats,
        )
        rows.append(row(f"decoding, batch {batch_size}", plain, measured))
        pairs = [(prompt, prompt.ids[:new_tokens]) for prompt in prompts]
        plain, measured = compare(
            partial(read, model, pairs), partial(measure_padded, model, pairs), repeats=options.repeats
        )
        rows.append(row(f"teacher-forced, batch {batch_size}", plain, measured))
    report("lookback_overhead", title=f"decoding with lookback ratios, target {TARGET:g}x", rows=rows)


def make_prompts(model: Any, batch_size: int, tokens: int) -> list[Prompt]:
    """Random prompts of different lengths, so that the batch is padded."""
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for index in range(batch_size):
        ids = torch.randint(10, model.config.vocab_size, (tokens - 7 * index,), generator=generator).tolist()
        prompts.append(Prompt(ids=ids, context_tokens=len(ids) - 5))
    return prompts


def decode(model: Any, prompts: list[Prompt], new_tokens: int) -> None:
    """Plain greedy decoding of the same left-padded batch."""
    ids, mask = padded(model, [prompt.ids for prompt in prompts])
    with torch.inference_mode():
        model.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None
        )


def read(model: Any, pairs: list[tuple[Prompt, list[int]]]) -> None:
    """Plain forward pass over the same left-padded batch."""
    ids, mask = padded(model, [prompt.ids + answer[:-1] for prompt, answer in pairs])
    with torch.inference_mode():
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)


def padded(model: Any, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
    return ids, mask


def compare(
    plain: Callable[[], object], measured: Callable[[], object], *, repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of both (processor time on a CPU), taken in turn, so that other load on the machine meets both."""
    plain()
    measured()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        seconds[0].append(timed(plain))
        seconds[1].append(timed(measured))
    return seconds


def timed(action: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        start = time.perf_counter()
        action()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    action()
    return time.process_time() - start


def row(name: str, plain: list[float], measured: list[float]) -> dict[str, Any]:
    """Medians of both and their ratio."""
    ratio = statistics.median(measured) / statistics.median(plain)
    return {
        "what": name,
        "plain, s": statistics.median(plain),
        "measured, s": statistics.median(measured),
        "ratio": ratio,
        "share of the target": ratio / TARGET,
    }


if __name__ == "__main__":
    main()
