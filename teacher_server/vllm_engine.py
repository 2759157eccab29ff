"""A teacher computed by vLLM, through its public pooling runner: hidden states after the final norm, the head is ours.

vLLM batches what all clients ask for; one request only bounds how much of it is under way, so that a slow reader
costs little memory and no client fills the queue alone.

Shape suffixes: T tokens, N label positions, D hidden size, V vocabulary.
"""

import asyncio
import logging
import os
import signal
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from services.contract.errors import InvalidInputError, TeacherError, TeacherUnavailableError
from services.contract.lm_head import LmHead
from services.contract.sequences import Continuation, DecodeOptions, LabelOptions, Prompt, TokenSequence
from services.contract.soft_labels import Array, ScoredSequence, hash_sequence
from teacher_server.checkpoint_head import load_checkpoint_head
from teacher_server.engine import TeacherCard
from teacher_server.fingerprint import fingerprint_model
from teacher_server.sizes import label_bytes
from teacher_server.tokenizer import from_transformers, stop_token_ids
from teacher_server.torch_head import TorchHead, to_numpy
from teacher_server.vllm_options import VllmOptions

logger = logging.getLogger(__name__)

UNDER_WAY_BYTES = 24 * 1024 * 1024
"""Labels of one request that are computed or wait for a slow reader at a time; one sequence is always allowed."""

UNDER_WAY_SEQUENCES = 64

_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
_CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    # The default leaves one core idle.
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
    # Compiling takes longer than it saves there.
    "TORCHDYNAMO_DISABLE": "1",
}

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class VllmEngine:
    """An Engine around vLLM's AsyncLLM, which runs in processes of its own.

    Scoring uses the pooling runner, which cannot decode; ``options.generation`` adds a second engine that can.
    When vLLM's processes die, this process ends itself with SIGTERM for its supervisor to start it again.
    """

    def __init__(
        self,
        directory: Path,
        *,
        name: str,
        revision: str,
        dtype: str,
        max_length: int | None,
        options: VllmOptions,
    ) -> None:
        self._directory = directory
        tokenizer = from_transformers(AutoTokenizer.from_pretrained(directory))
        self._tokenize = tokenizer.encode
        self._scorer = _start(directory, dtype=dtype, max_length=max_length, options=options, pooling=True)
        self._generator = (
            _start(directory, dtype=dtype, max_length=max_length, options=options, pooling=False)
            if options.generation
            else None
        )
        model_config = self._scorer.vllm_config.model_config
        self._dtype: torch.dtype = model_config.dtype
        head_owner = load_checkpoint_head(directory, dtype=self._dtype, device=_head_device())
        self._torch_head = TorchHead(head_owner, vocab_size=tokenizer.vocab_size)
        weights_dtype = str(self._dtype).removeprefix("torch.")
        # Quantised weights give other labels than the files they come from.
        computed_in = f"{weights_dtype} {options.quantization}" if options.quantization else weights_dtype
        self.card = TeacherCard(
            engine="vllm",
            model=name,
            revision=revision,
            fingerprint=fingerprint_model(directory, tokenizer_fingerprint=tokenizer.fingerprint, dtype=computed_in),
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            hidden_size=self._torch_head.weight_VD.shape[1],
            max_length=model_config.max_model_len,
            generates=self._generator is not None,
            special_token_ids=tokenizer.special_token_ids,
            stop_token_ids=stop_token_ids(directory, tokenizer.special_token_ids.get("eos")),
            weights_dtype=weights_dtype,
        )
        # The head's products use every core; two at a time would only slow each other down.
        self._head_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher-head")

    def describe(self) -> TeacherCard:
        return self.card

    def lm_head(self) -> LmHead:
        return self._torch_head.to_numpy()

    def tokenize(self, text: str) -> list[int]:
        return self._tokenize(text)

    @torch.inference_mode()
    def reference_logits(self, token_ids: Sequence[int]) -> Array:
        """A forward pass by transformers on the CPU, with the weights mapped from disk and dropped afterwards."""
        logger.info("comparing with a forward pass by transformers on the processor; minutes for large models")
        config = AutoConfig.from_pretrained(self._directory)
        model: Any = AutoModelForCausalLM.from_pretrained(self._directory, config=config, dtype=self._dtype).eval()
        logits_TV = model(input_ids=torch.tensor([list(token_ids)])).logits[0, :, : self.card.vocab_size]
        return to_numpy(logits_TV.float())

    async def score(
        self, sequences: Sequence[TokenSequence], options: LabelOptions
    ) -> AsyncGenerator[ScoredSequence, None]:
        def size(sequence: TokenSequence) -> int:
            return label_bytes(
                options,
                positions=len(sequence.label_positions),
                vocab_size=self.card.vocab_size,
                hidden_size=self.card.hidden_size,
                state_bytes=self._dtype.itemsize,
            )

        results = _bounded(sequences, lambda sequence: self._score_one(sequence, options), size=size)
        async with aclosing(results):
            async for scored in results:
                yield scored

    async def generate(self, prompts: Sequence[Prompt], options: DecodeOptions) -> AsyncGenerator[Continuation, None]:
        results = _bounded(prompts, lambda prompt: self._continue_one(prompt, options), size=lambda _: 0)
        async with aclosing(results):
            async for continuation in results:
                yield continuation

    def close(self) -> None:
        for engine in (self._scorer, self._generator):
            if engine is not None:
                engine.shutdown()
        self._head_thread.shutdown(wait=False, cancel_futures=True)

    async def _score_one(self, sequence: TokenSequence, options: LabelOptions) -> ScoredSequence:
        from vllm import PoolingParams

        # Without use_activation=False the states come back normalised to length 1.
        how = PoolingParams(task="token_embed", use_activation=False)
        prompt = {"prompt_token_ids": list(sequence.token_ids)}
        output = await self._last(self._scorer.encode(prompt, how, uuid.uuid4().hex))
        hidden_TD = output.outputs.data
        if hidden_TD.shape != (len(sequence.token_ids), self.card.hidden_size):
            # vLLM answers an aborted request with an empty tensor instead of an error.
            raise TeacherUnavailableError(
                f"the teacher gave up sequence {sequence.id!r}", fix="Ask for this sequence again."
            )
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._head_thread, self._label, sequence, hidden_TD, options)

    @torch.inference_mode()
    def _label(self, sequence: TokenSequence, hidden_TD: torch.Tensor, options: LabelOptions) -> ScoredSequence:
        device = self._torch_head.weight_VD.device
        positions_N = torch.tensor(sequence.label_positions, dtype=torch.long)
        token_ids_T = torch.tensor(sequence.token_ids)
        # The state after token p - 1 predicts token p.
        hidden_ND = hidden_TD[positions_N - 1].to(device=device, dtype=self._dtype)
        token_logprobs_N, labels = self._torch_head.labels(
            hidden_ND, token_ids_N=token_ids_T[positions_N].to(device), options=options
        )
        return ScoredSequence(
            id=sequence.id,
            sequence_hash=hash_sequence(sequence.token_ids, sequence.label_positions),
            token_logprobs_N=token_logprobs_N,
            labels=labels,
        )

    async def _continue_one(self, prompt: Prompt, options: DecodeOptions) -> Continuation:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        assert self._generator is not None, "requests for a teacher that does not generate are refused"
        how = SamplingParams(
            temperature=options.temperature,
            # Per prompt, so that draws depend on nothing else that is under way.
            seed=None if options.temperature == 0 else _prompt_seed(prompt, options.seed),
            max_tokens=options.max_new_tokens,
            ignore_eos=True,
            stop_token_ids=list(options.stop_token_ids or self.card.stop_token_ids),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        ids = {"prompt_token_ids": list(prompt.token_ids)}
        output = await self._last(self._generator.generate(ids, how, uuid.uuid4().hex))
        answer = output.outputs[0]
        if answer.finish_reason not in ("stop", "length"):
            raise TeacherUnavailableError(f"the teacher gave up prompt {prompt.id!r}", fix="Ask for it again.")
        return Continuation(id=prompt.id, token_ids=tuple(answer.token_ids), finish_reason=answer.finish_reason)

    async def _last(self, outputs: AsyncGenerator[Any, None]) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        last = None
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    last = output
        except EngineDeadError:
            logger.critical("vLLM's engine has died; ending so that the supervisor starts this teacher again")
            os.kill(os.getpid(), signal.SIGTERM)
            raise TeacherUnavailableError(
                "the teacher's engine has died", fix="The teacher restarts; ask again in a while."
            ) from None
        except ValueError as error:
            raise InvalidInputError(f"vLLM refuses the request: {error}", fix="Change the request.") from None
        return last


async def _bounded(
    items: Sequence[ItemT], compute: Callable[[ItemT], Coroutine[Any, Any, ResultT]], *, size: Callable[[ItemT], int]
) -> AsyncGenerator[ResultT, None]:
    """Results as they come, with at most UNDER_WAY_BYTES and UNDER_WAY_SEQUENCES under way or unread."""
    waiting = deque(items)
    tasks: dict[asyncio.Task[ResultT], int] = {}
    try:
        while waiting or tasks:
            while waiting and len(tasks) < UNDER_WAY_SEQUENCES:
                needed = size(waiting[0])
                if tasks and sum(tasks.values()) + needed > UNDER_WAY_BYTES:
                    break
                tasks[asyncio.create_task(compute(waiting.popleft()))] = needed
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
                del tasks[task]
    finally:
        # Cancelling a task aborts its request inside vLLM.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _start(directory: Path, *, dtype: str, max_length: int | None, options: VllmOptions, pooling: bool) -> Any:
    # vLLM reads these when it is imported, and its processes inherit them; what a user has set stays.
    for name, value in (_ENVIRONMENT if torch.cuda.is_available() else _ENVIRONMENT | _CPU_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    from vllm.config import PoolerConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments: dict[str, Any] = {
        "model": str(directory),
        "dtype": dtype if dtype != "auto" or torch.cuda.is_available() else "float32",
        "max_model_len": max_length,
        "tensor_parallel_size": options.tensor_parallel_size,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "quantization": options.quantization,
        # Scoring and decoding are two engines on the same GPUs.
        "gpu_memory_utilization": options.gpu_memory_utilization / (2 if options.generation else 1),
        "enforce_eager": not torch.cuda.is_available(),
        "enable_log_requests": False,
        "disable_log_stats": True,
    }
    if pooling:
        arguments |= {
            "runner": "pooling",
            "convert": "embed",
            "pooler_config": PoolerConfig(task="token_embed", tok_pooling_type="ALL", use_activation=False),
            "enable_prefix_caching": False,
        }
    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    except (RuntimeError, ValueError, OSError) as error:
        raise TeacherError(
            f"vLLM does not start: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            fix="Its own lines above say why; too little GPU memory: lower --max-length or --gpu-memory-utilization, "
            "or use more GPUs with --tensor-parallel-size.",
        ) from error


def _head_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _prompt_seed(prompt: Prompt, seed: int) -> int:
    digest = hash_sequence([seed % 2**32, *prompt.token_ids], [len(prompt.id)])
    return int.from_bytes(digest[:6], "little")
