"""A teacher computed by transformers, on the CPU or one GPU.

Shape suffixes: B sequences of a batch, T tokens, N label positions, D hidden size, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from services.contract.errors import InvalidInputError, UnsupportedError
from services.contract.sequences import DecodeOptions, LabelOptions, Prompt, TokenSequence
from services.contract.soft_labels import ScoredSequence
from services.contract.tensors import Array
from teacher_server.adapter import merge_adapter
from teacher_server.batching import DecodeWatch
from teacher_server.decoding import decode_batch
from teacher_server.engine import TeacherCard
from teacher_server.fingerprint import fingerprint_model
from teacher_server.student_heads import StudentHeads
from teacher_server.tokenizer import load_tokenizer, stop_token_ids
from teacher_server.torch_head import TorchHead, to_numpy

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TransformersModel:
    """A BatchModel around a causal language model that ``save_pretrained`` wrote to ``directory``.

    A LoRA ``adapter`` of it is merged in. ``dtype`` auto is float32 on the CPU, where 16-bit arithmetic is slow, and
    the checkpoint's own type on a GPU. ``max_length`` None is the model's limit. Code that comes with
    the model runs only with ``trust_remote_code``.
    """

    max_batch_sequences = 64

    def __init__(
        self,
        directory: Path,
        *,
        adapter: Path | None = None,
        name: str = "",
        revision: str = "",
        dtype: str = "auto",
        device: str = "auto",
        max_length: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._device = _device(device)
        on_cpu = self._device.type == "cpu"
        tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
        # A bar that redraws itself is no line of a log.
        transformers_logging.disable_progress_bar()
        wanted: Any = _DTYPES.get(dtype, torch.float32 if on_cpu else "auto")
        model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=wanted, use_safetensors=True, trust_remote_code=trust_remote_code
        )
        if adapter is not None:
            model = merge_adapter(model, adapter)
        self._model = _in_own_memory(model.to(self._device)).eval()
        # Small batches keep a CPU responsive; a GPU needs large ones to be busy.
        self.max_batch_tokens = 1_024 if on_cpu else 16_384
        self._tokenize = tokenizer.encode
        self._torch_head = TorchHead(self._model, vocab_size=tokenizer.vocab_size)
        self.head = self._torch_head.to_numpy()
        # Decoding follows the request alone, not the penalties and cut-offs that a checkpoint recommends.
        self._model.generation_config = GenerationConfig()
        weights_dtype = str(self._torch_head.weight_VD.dtype).removeprefix("torch.")
        self.card = TeacherCard(
            engine="transformers",
            model=name or str(directory),
            revision=revision,
            fingerprint=fingerprint_model(
                directory, adapter=adapter, tokenizer_fingerprint=tokenizer.fingerprint, dtype=weights_dtype
            ),
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            hidden_size=self._torch_head.weight_VD.shape[1],
            max_length=_max_length(self._model.config.get_text_config(), max_length),
            generates=True,
            special_token_ids=tokenizer.special_token_ids,
            stop_token_ids=stop_token_ids(directory, tokenizer.special_token_ids.get("eos")),
            weights_dtype=weights_dtype,
        )
        self._backbone_options = _accepted_options(self._model.base_model)

    def tokenize(self, text: str) -> list[int]:
        return self._tokenize(text)

    @torch.inference_mode()
    def reference_logits(self, token_ids: Sequence[int]) -> Array:
        """The whole model's forward pass on the sequence alone."""
        ids_1T = torch.tensor([list(token_ids)], device=self._device)
        logits_TV = self._model(input_ids=ids_1T).logits[0, :, : self.card.vocab_size]
        return to_numpy(logits_TV.float())

    @torch.inference_mode()
    def score(self, work: Sequence[tuple[TokenSequence, LabelOptions]]) -> list[ScoredSequence]:
        hidden_BTD = self._hidden([sequence.token_ids for sequence, _ in work])
        return self._torch_head.score(
            [(hidden_TD, sequence, options) for hidden_TD, (sequence, options) in zip(hidden_BTD, work, strict=True)]
        )

    @property
    def student_heads(self) -> StudentHeads[Any]:
        return self._torch_head.student_heads

    def generate(self, prompts: Sequence[Prompt], options: DecodeOptions, watch: DecodeWatch) -> None:
        decode_batch(
            self._model,
            prompts,
            options,
            vocab_size=self.card.vocab_size,
            stop_token_ids=options.stop_token_ids or self.card.stop_token_ids,
            watch=watch,
        )

    def _hidden(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """States after the final norm, [B, T, D]; what stands in padding is meaningless."""
        longest = max(map(len, sequences))
        ids_BT = torch.zeros((len(sequences), longest), dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        # Padding on the right: in a causal model no real token sees it, and positions count from 0.
        for row, ids in enumerate(sequences):
            ids_BT[row, : len(ids)] = torch.tensor(list(ids))
            mask_BT[row, : len(ids)] = 1
        output = self._model.base_model(
            input_ids=ids_BT.to(self._device), attention_mask=mask_BT.to(self._device), **self._backbone_options
        )
        hidden_BTD: torch.Tensor = output.last_hidden_state
        return hidden_BTD


def _in_own_memory(model: Any) -> Any:
    """On a CPU weights are mapped from their files, and would change with these."""
    if model.device.type == "cpu":
        for tensor in {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values():
            tensor.data = tensor.data.clone()
    return model


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInputError(
            f"the device {name!r} cannot be used: {reason}", fix="Choose auto, cpu, cuda or cuda:N."
        ) from None
    return device


def _max_length(config: Any, wanted: int | None) -> int:
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if wanted is None:
        if limit is None:
            raise InvalidInputError("the model names no longest sequence", fix="Set one with --max-length.")
        return int(limit)
    if limit is not None and wanted > limit:
        raise InvalidInputError(
            f"max_length {wanted} is beyond the {limit} positions of the model", fix=f"Use at most {limit}."
        )
    return wanted


def _accepted_options(backbone: Any) -> dict[str, bool]:
    """No key-value cache: scoring reads every sequence once."""
    parameters = inspect.signature(backbone.forward).parameters
    if "attention_mask" not in parameters:
        raise UnsupportedError(
            f"{type(backbone).__name__} takes no attention mask, so sequences of several lengths cannot share a batch",
            fix="Serve another model.",
        )
    return {"use_cache": False} if "use_cache" in parameters else {}
