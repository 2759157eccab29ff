"""The four rpcs of TeacherService, around one engine."""

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any, TypeVar

from services.contract.errors import TeacherUnavailableError
from services.contract.soft_labels import WIRE_ENCODINGS
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.teacher.v1.teacher_service_pb2_grpc import TeacherServiceServicer
from teacher_server.engine import MAX_K, Engine
from teacher_server.requests import (
    MAX_SEQUENCES,
    check_model,
    check_probe_texts,
    read_generate_request,
    read_score_request,
)
from teacher_server.status import translated_errors
from teacher_server.wire import encode_head, encode_scored, numpy_dtype

Context = Any
"""grpc.aio.ServicerContext; its stubs lack abort_with_status."""

Message = TypeVar("Message")

_FINISH_REASONS = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


class TeacherServicer(TeacherServiceServicer):
    """Answers UNAVAILABLE until ``start_serving``.

    Cancelled calls and calls past their deadline end as asyncio cancellations, which close the engine's iterators.
    """

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._label_dtype = "bfloat16"

    def start_serving(self, engine: Engine, *, label_dtype: str) -> None:
        """``label_dtype``: in which hidden states travel."""
        self._label_dtype = label_dtype
        self._engine = engine

    def close(self) -> None:
        """Stop the engine, if one is serving."""
        if self._engine is not None:
            self._engine.close()

    async def GetTeacher(self, request: pb.GetTeacherRequest, context: Context) -> pb.GetTeacherResponse:  # noqa: N802
        async with translated_errors(context):
            engine = self._ready_engine()
            card = engine.describe()
            check_model(request.model, "", card)
            check_probe_texts(request.probe_texts)
            return pb.GetTeacherResponse(
                model=card.model,
                revision=card.revision,
                fingerprint=card.fingerprint,
                tokenizer_fingerprint=card.tokenizer_fingerprint,
                vocab_size=card.vocab_size,
                hidden_size=card.hidden_size,
                max_length=card.max_length,
                encodings=list(WIRE_ENCODINGS.values()),
                max_k=MAX_K,
                max_sequences=MAX_SEQUENCES,
                probe_ids=[pb.TokenIds(ids=engine.tokenize(text)) for text in request.probe_texts],
                engine=card.engine,
                generates=card.generates,
                special_token_ids=card.special_token_ids,
            )
        return pb.GetTeacherResponse()

    async def GetLmHead(self, request: pb.GetLmHeadRequest, context: Context) -> None:  # noqa: N802
        async with translated_errors(context):
            engine = self._ready_engine()
            check_model(request.model, request.fingerprint, engine.describe())
            parts = encode_head(engine.lm_head())
            while (part := await asyncio.to_thread(_next_part, parts)) is not None:
                await context.write(part)

    async def ScoreSequences(self, request: pb.ScoreSequencesRequest, context: Context) -> None:  # noqa: N802
        async with translated_errors(context):
            engine = self._ready_engine()
            sequences, options = await asyncio.to_thread(
                read_score_request,
                request,
                engine.describe(),
                state_bytes=numpy_dtype(self._label_dtype).itemsize,
            )
            async with aclosing(engine.score(sequences, options)) as stream:
                async for scored in stream:
                    await context.write(await asyncio.to_thread(encode_scored, scored, label_dtype=self._label_dtype))

    async def GenerateSequences(self, request: pb.GenerateSequencesRequest, context: Context) -> None:  # noqa: N802
        async with translated_errors(context):
            engine = self._ready_engine()
            prompts, options = await asyncio.to_thread(read_generate_request, request, engine.describe())
            async with aclosing(engine.generate(prompts, options)) as stream:
                async for continuation in stream:
                    await context.write(
                        pb.GenerateSequencesResponse(
                            id=continuation.id,
                            token_ids=continuation.token_ids,
                            finish_reason=_FINISH_REASONS[continuation.finish_reason],
                        )
                    )

    def _ready_engine(self) -> Engine:
        if self._engine is None:
            raise TeacherUnavailableError("the teacher is still loading its model", fix="Ask again in a while.")
        return self._engine


def _next_part(parts: Iterator[Message]) -> Message | None:
    return next(parts, None)
