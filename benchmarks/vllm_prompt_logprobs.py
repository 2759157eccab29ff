"""vLLM's own way to a teacher's distribution, run by the environment that has vLLM: log-probabilities of prompts.

Speaks JSON lines: reads {"sequences": [[ids], ...], "k": 100}, answers {"seconds": ...}; writes {"ready": true} first.
With "k": null it computes the prompts and gives no distribution: what no way to one can undercut.
Not part of the measurements by itself: ``python -m benchmarks.teacher_labels`` starts it.
"""

import asyncio
import json
import sys
import time

from vllm import SamplingParams, TokensPrompt
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM


async def main(model: str, max_length: int, dtype: str) -> None:
    arguments = AsyncEngineArgs(
        model=model,
        dtype=dtype,
        max_model_len=max_length,
        max_logprobs=100,
        enforce_eager=True,
        enable_prefix_caching=False,
        enable_log_requests=False,
        disable_log_stats=True,
    )
    engine = AsyncLLM.from_engine_args(arguments)
    _answer({"ready": True})
    try:
        while line := await asyncio.to_thread(sys.stdin.readline):
            request = json.loads(line)
            started = time.perf_counter()
            await asyncio.gather(*(score(engine, ids, request["k"]) for ids in request["sequences"]))
            _answer({"seconds": time.perf_counter() - started})
    finally:
        engine.shutdown()


async def score(engine: AsyncLLM, ids: list[int], k: int | None) -> None:
    """One prompt's top-k log-probabilities at every position, in the cheapest form that vLLM offers."""
    how = SamplingParams(
        max_tokens=1,
        prompt_logprobs=k,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    async for output in engine.generate(TokensPrompt(prompt_token_ids=ids), how, f"{id(ids)}"):
        assert k is None or len(output.prompt_logprobs or ()) == len(ids)


def _answer(content: dict[str, object]) -> None:
    # vLLM's processes log to the same stream; a mark tells our lines apart.
    print("@" + json.dumps(content), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
