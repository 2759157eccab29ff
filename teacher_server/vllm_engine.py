"""A teacher computed by vLLM, through its public pooling runner: hidden states after the final norm, the head is ours.

vLLM batches whatever is awaited at the same time; cancelling a task aborts its request inside vLLM.

Shape suffixes: T tokens, N label positions, D hidden size, V vocabulary.
"""

import asyncio
import logging
import math
import os
import uuid
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from services.contract.errors import InvalidInputError, TeacherUnavailableError
from services.contract.lm_head import LmHead
from services.contract.sequences import Continuation, DecodeOptions, LabelOptions, Prompt, TokenSequence
from services.contract.soft_labels import ScoredSequence
from services.contract.tensors import Array
from teacher_server.adapter import merge_adapter
from teacher_server.checkpoint_head import load_checkpoint_head
from teacher_server.draws import draw_seed
from teacher_server.engine import ENGINE_FAILED, BatchReport, Capacity, TeacherCard, logits_not_finite
from teacher_server.fingerprint import fingerprint_model
from teacher_server.gathered import Gathered
from teacher_server.student_heads import StudentHeads
from teacher_server.tokenizer import load_tokenizer, stop_token_ids
from teacher_server.torch_head import TorchHead, to_numpy
from teacher_server.weights import Weights

logger = logging.getLogger(__name__)

_Work = tuple[torch.Tensor, TokenSequence, LabelOptions]

_LABELLED_TOGETHER = 32
"""Sequences of exact labels, which share a product with the head; others take too long to wait for each other."""

_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.01, 2.0
"""vLLM silently raises what is below, and refuses what is above."""


class VllmEngine:
    """An Engine around vLLM's AsyncLLM for one set of weights, which its processes hold while this is in use.

    ``generator`` None does not decode; ``lora`` is vLLM's request for the weights' adapter. When vLLM's processes die,
    this process ends in an error for its supervisor to start it again.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        scorer: Any,
        generator: Any,
        lora: Any,
        quantization: str | None,
        trust_remote_code: bool = False,
    ) -> None:
        self._weights = weights
        self._trust_remote_code = trust_remote_code
        self._scorer, self._generator, self._lora = scorer, generator, lora
        tokenizer = load_tokenizer(weights.directory, trust_remote_code=trust_remote_code)
        self._tokenize = tokenizer.encode
        model_config = self._scorer.vllm_config.model_config
        self._dtype: torch.dtype = model_config.dtype
        head_owner = load_checkpoint_head(
            weights.directory, dtype=self._dtype, device=_head_device(), trust_remote_code=trust_remote_code
        )
        self._torch_head = TorchHead(head_owner, vocab_size=tokenizer.vocab_size)
        weights_dtype = str(self._dtype).removeprefix("torch.")
        # Quantised weights give other labels than the files they come from.
        computed_in = f"{weights_dtype} {quantization}" if quantization else weights_dtype
        self.card = TeacherCard(
            engine="vllm",
            model=weights.name,
            revision=weights.revision,
            fingerprint=fingerprint_model(
                weights.directory,
                adapter=weights.adapter,
                tokenizer_fingerprint=tokenizer.fingerprint,
                dtype=computed_in,
            ),
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            hidden_size=self._torch_head.weight_VD.shape[1],
            max_length=model_config.max_model_len,
            generates=self._generator is not None,
            special_token_ids=tokenizer.special_token_ids,
            stop_token_ids=stop_token_ids(weights.directory, tokenizer.special_token_ids.get("eos")),
            weights_dtype=weights_dtype,
        )
        # Rows that pad the head are no tokens, but to vLLM they are.
        padding = range(tokenizer.vocab_size, model_config.get_vocab_size())
        self._never_written = dict.fromkeys(padding, -math.inf)
        # The head's products use every core; two at a time would only slow each other down.
        self._head_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher-head")
        self._exact = Gathered(self._label, executor=self._head_thread, most=_LABELLED_TOGETHER)

    def describe(self) -> TeacherCard:
        return self.card

    def lm_head(self) -> LmHead:
        return self._torch_head.to_numpy()

    @property
    def student_heads(self) -> StudentHeads[Any]:
        return self._torch_head.student_heads

    def tokenize(self, text: str) -> list[int]:
        return self._tokenize(text)

    @torch.inference_mode()
    def reference_logits(self, token_ids: Sequence[int]) -> Array:
        """A forward pass by transformers on the CPU, with the weights mapped from disk and dropped afterwards."""
        logger.info("comparing with a forward pass by transformers on the processor; minutes for large models")
        directory = self._weights.directory
        config = AutoConfig.from_pretrained(directory, trust_remote_code=self._trust_remote_code)
        model: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=self._dtype,
            use_safetensors=True,
            trust_remote_code=self._trust_remote_code,
        )
        if self._weights.adapter is not None:
            model = merge_adapter(model, self._weights.adapter)
        model.eval()
        logits_TV = model(input_ids=torch.tensor([list(token_ids)])).logits[0, :, : self.card.vocab_size]
        return to_numpy(logits_TV.float())

    @property
    def score_capacity(self) -> Capacity:
        return _capacity(self._scorer)

    @property
    def decode_capacity(self) -> Capacity:
        return _capacity(self._generator or self._scorer, decodes=True)

    async def score(self, sequence: TokenSequence, options: LabelOptions) -> ScoredSequence:
        from vllm import PoolingParams

        # Without use_activation=False the states come back normalised to length 1.
        how = PoolingParams(task="token_embed", use_activation=False)
        prompt = {"prompt_token_ids": list(sequence.token_ids)}
        output = await self._last(self._scorer.encode(prompt, how, uuid.uuid4().hex, lora_request=self._lora))
        hidden_TD = output.outputs.data
        if hidden_TD.shape != (len(sequence.token_ids), self.card.hidden_size):
            # vLLM answers an aborted request with an empty tensor instead of an error.
            raise TeacherUnavailableError("the teacher gave it up", fix="Ask for this sequence again.")
        work = (hidden_TD, sequence, options)
        if options.encoding == "exact":
            return await self._exact(work)
        return (await asyncio.get_running_loop().run_in_executor(self._head_thread, self._label, [work]))[0]

    async def generate(self, prompt: Prompt, options: DecodeOptions) -> Continuation:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        assert self._generator is not None, "requests for a teacher that does not generate are refused"
        if options.temperature and not _MIN_TEMPERATURE <= options.temperature <= _MAX_TEMPERATURE:
            raise InvalidInputError(
                f"vLLM draws at temperatures from {_MIN_TEMPERATURE:g} to {_MAX_TEMPERATURE:g}, not at "
                f"{options.temperature:g}",
                fix="Choose one of these, or 0, which is greedy; --engine transformers draws at any.",
            )
        how = SamplingParams(
            temperature=options.temperature,
            # Per prompt, so that draws depend on nothing else that is under way.
            seed=None if options.temperature == 0 else draw_seed(prompt, options, bits=48),
            max_tokens=options.max_new_tokens,
            ignore_eos=True,
            stop_token_ids=list(options.stop_token_ids or self.card.stop_token_ids),
            logit_bias=self._never_written or None,
            # Of the chosen tokens alone: out of logits that are no numbers vLLM chooses as if nothing were wrong.
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        ids = {"prompt_token_ids": list(prompt.token_ids)}
        output = await self._last(self._generator.generate(ids, how, uuid.uuid4().hex, lora_request=self._lora))
        answer = output.outputs[0]
        if answer.finish_reason not in ("stop", "length"):
            raise TeacherUnavailableError("the teacher gave it up", fix="Ask for this prompt again.")
        if math.isnan(answer.cumulative_logprob):
            raise logits_not_finite()
        return Continuation(id=prompt.id, token_ids=tuple(answer.token_ids), finish_reason=answer.finish_reason)

    def watch_batches(self, report: BatchReport) -> None:
        """vLLM makes its batches in processes of its own, and never reports."""

    def close(self) -> None:
        """vLLM's processes live on: other weights may come into them."""
        self._head_thread.shutdown(wait=False, cancel_futures=True)

    @torch.inference_mode()
    def _label(self, work: Sequence[_Work]) -> list[ScoredSequence]:
        return self._torch_head.score(work)

    async def _last(self, outputs: AsyncGenerator[Any, None]) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        last = None
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    last = output
        except EngineDeadError:
            end_without_engine()
            raise TeacherUnavailableError(
                "the teacher's engine has died", fix="The teacher restarts; ask again in a while."
            ) from None
        except ValueError as error:
            raise InvalidInputError(f"vLLM refuses the request: {error}", fix="Change the request.") from None
        return last


def end_without_engine() -> None:
    """Let this process end in an error, after what vLLM's own have done."""
    logger.critical("vLLM's engine has died; ending so that the supervisor starts this teacher again")
    os.kill(os.getpid(), ENGINE_FAILED)


def _capacity(engine: Any, *, decodes: bool = False) -> Capacity:
    """Two steps' worth, so that there is always something to begin when sequences end."""
    scheduler = engine.vllm_config.scheduler_config
    sequences = 2 * scheduler.max_num_seqs
    # A decode step computes one token of each sequence; what else they occupy in the cache vLLM minds itself.
    tokens = (
        sequences * engine.vllm_config.model_config.max_model_len if decodes else 2 * scheduler.max_num_batched_tokens
    )
    return Capacity(sequences=sequences, tokens=tokens)


def _head_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
