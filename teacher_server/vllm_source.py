"""vLLM's processes, started once, and the weights that they hold by turns.

Other weights take the place of the old ones in them. Requests for several never share a batch: on CPUs, vLLM 0.32 then
adds the adapter of one request to the others as well.
"""

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

import torch

from services.contract.errors import TeacherError, UnsupportedError
from teacher_server.engine import Engine
from teacher_server.in_thread import in_daemon_thread
from teacher_server.options import TeacherOptions
from teacher_server.tokenizer import TeacherTokenizer, load_tokenizer
from teacher_server.vllm_engine import VllmEngine, end_without_engine
from teacher_server.vllm_options import VllmOptions
from teacher_server.vllm_plugin import mark_as_teacher
from teacher_server.weights import Weights, read_adapter, weights_at

logger = logging.getLogger(__name__)

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Those that vLLM can be started for."""

_LOOK_SECONDS = 2.0
"""How often it is seen whether vLLM's processes live: an idle teacher would say that it serves without them."""

_NOT_ADAPTED = ("lm_head", "embed_tokens", "wte", "embed_in", "embed_out")
"""The pooling runner has no output head, and the head here is the checkpoint's own."""

_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
_CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    # The default leaves one core idle.
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
    # Compiling takes longer than it saves there.
    "TORCHDYNAMO_DISABLE": "1",
}


class VllmSource:
    """An EngineSource. ``weights``: what to start with.

    Scoring uses the pooling runner, which cannot decode; ``options.vllm.generation`` adds a second engine that can.
    """

    in_place = True

    def __init__(self, weights: Weights, options: TeacherOptions) -> None:
        self._start_weights = weights
        self._options = options
        self._max_rank = max(options.vllm.max_lora_rank, _adapter_rank(weights.adapter) if weights.adapter else 0)
        self._scorer: Any = None
        self._generator: Any = None
        # Of the base model in the processes; None while it is not certain what they hold.
        self._loaded: Weights | None = None
        self._adapters = 0
        self._watching: asyncio.Task[None] | None = None

    def start_weights(self) -> Weights:
        return self._start_weights

    def tokenizer(self, weights: Weights) -> TeacherTokenizer:
        return load_tokenizer(weights.directory, trust_remote_code=self._options.trust_remote_code)

    async def load(self, weights: Weights) -> Engine:
        """UnsupportedError for an adapter that vLLM was not started for, or cannot apply."""
        if weights.adapter is not None:
            self._require_room(weights.adapter)
        base = weights_at(str(weights.directory), directory=weights.directory)
        if self._scorer is None:
            await in_daemon_thread(lambda: self._start(weights.directory), name="teacher-load")
            self._watching = asyncio.create_task(self._watch())
        elif base != self._loaded:
            await self._reload(weights.directory)
        self._loaded = base
        lora = await self._add_adapter(weights) if weights.adapter is not None else None
        return await in_daemon_thread(
            lambda: VllmEngine(
                weights,
                scorer=self._scorer,
                generator=self._generator,
                lora=lora,
                quantization=self._options.vllm.quantization,
                trust_remote_code=self._options.trust_remote_code,
            ),
            name="teacher-load",
        )

    def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        for engine in (self._scorer, self._generator):
            if engine is not None:
                engine.shutdown()

    def _start(self, directory: Path) -> None:
        options = self._options
        for pooling in (True, False) if options.vllm.generation else (True,):
            engine = _start_engine(
                directory,
                dtype=options.dtype,
                max_length=options.max_length,
                options=options.vllm,
                max_lora_rank=self._max_rank,
                pooling=pooling,
                trust_remote_code=options.trust_remote_code,
            )
            if pooling:
                self._scorer = engine
            else:
                self._generator = engine

    async def _watch(self) -> None:
        while not any(engine.errored for engine in (self._scorer, self._generator) if engine is not None):
            await asyncio.sleep(_LOOK_SECONDS)
        end_without_engine()

    async def _reload(self, directory: Path) -> None:
        self._loaded = None
        for engine in filter(None, (self._scorer, self._generator)):
            try:
                await engine.collective_rpc("reload_weights", kwargs={"weights_path": str(directory)})
                forgotten = await engine.reset_prefix_cache()
            except Exception as error:
                # vLLM passes on whatever went wrong in its processes as a bare Exception.
                raise TeacherError(
                    f"vLLM cannot load the weights in {directory}: {_first_line(error)}",
                    fix="The lines above in the teacher's log say why.",
                ) from error
            if not forgotten:
                raise TeacherError(
                    "vLLM still holds what it computed with the former weights", fix="Have them loaded again."
                )

    async def _add_adapter(self, weights: Weights) -> Any:
        from vllm.lora.request import LoRARequest

        self._adapters += 1
        lora = LoRARequest(f"adapter-{self._adapters}", self._adapters, str(weights.adapter))
        for engine in filter(None, (self._scorer, self._generator)):
            try:
                await engine.add_lora(lora)
            except Exception as error:
                # As above.
                raise TeacherError(
                    f"vLLM cannot load the adapter in {weights.adapter}: {_first_line(error)}",
                    fix="Merge it into its base model, and load that.",
                ) from error
        return lora

    def _require_room(self, adapter: Path) -> None:
        rank = _adapter_rank(adapter)
        if rank > self._max_rank:
            raise UnsupportedError(
                f"{adapter} is an adapter of rank {rank}, and vLLM was started for adapters of rank {self._max_rank} "
                "at most",
                fix=f"Start the teacher with --max-lora-rank {rank}, or merge the adapter into its base model.",
            )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _adapter_rank(adapter: Path) -> int:
    config = read_adapter(adapter)
    targets = config.get("target_modules") or []
    modules = [targets] if isinstance(targets, str) else [*targets, *(config.get("modules_to_save") or [])]
    head = [module for module in modules if any(name in module for name in _NOT_ADAPTED)]
    if head or config.get("use_dora") or config.get("bias", "none") != "none":
        what = f"changes {head[0]}" if head else "has biases or magnitudes of its own"
        raise UnsupportedError(
            f"the adapter in {adapter} {what}, which vLLM does not apply here",
            fix="Merge it into its base model and load that, or serve it with --engine transformers.",
        )
    rank = max(int(config.get("r", 8)), *map(int, (config.get("rank_pattern") or {}).values()), 1)
    fitting = [allowed for allowed in _RANKS if allowed >= rank]
    if not fitting:
        raise UnsupportedError(
            f"the adapter in {adapter} has the rank {rank}; vLLM takes {_RANKS[-1]} at most",
            fix="Merge it into its base model, and load that.",
        )
    return fitting[0]


def _start_engine(
    directory: Path,
    *,
    dtype: str,
    max_length: int | None,
    options: VllmOptions,
    max_lora_rank: int,
    pooling: bool,
    trust_remote_code: bool,
) -> Any:
    # vLLM reads these when it is imported, and its processes inherit them; what a user has set stays.
    for name, value in (_ENVIRONMENT if torch.cuda.is_available() else _ENVIRONMENT | _CPU_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    mark_as_teacher(os.environ)
    from vllm.config import PoolerConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments: dict[str, Any] = {
        "model": str(directory),
        "dtype": dtype if dtype != "auto" or torch.cuda.is_available() else "float32",
        "max_model_len": max_length,
        "trust_remote_code": trust_remote_code,
        "tensor_parallel_size": options.tensor_parallel_size,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "quantization": options.quantization,
        # Scoring and decoding are two engines on the same GPUs.
        "gpu_memory_utilization": options.gpu_memory_utilization / (2 if options.generation else 1),
        "enforce_eager": not torch.cuda.is_available(),
        "enable_log_requests": False,
        "disable_log_stats": True,
    }
    if max_lora_rank:
        arguments |= {"enable_lora": True, "max_lora_rank": max_lora_rank, "max_loras": 1}
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
