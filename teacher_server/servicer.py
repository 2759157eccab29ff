"""The rpcs of TeacherService, around whatever weights are served."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import grpc.aio

from services.contract.release import LABEL_FORMAT, release
from services.contract.soft_labels import WIRE_ENCODINGS
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.teacher.v1.teacher_service_pb2_grpc import (
    TeacherServiceServicer,
    add_TeacherServiceServicer_to_server,
)
from services.contract.teacher_channel import CLIENT_KEY, SERVICE_NAME
from services.contract.tensors import tensor_type
from teacher_server.admission import Admission
from teacher_server.engine import MAX_DRAWS, MAX_K
from teacher_server.metrics import TeacherMetrics
from teacher_server.models import Models
from teacher_server.requests import (
    MAX_SEQUENCES,
    check_model,
    check_probe_texts,
    read_generate_request,
    read_score_request,
)
from teacher_server.scoring import PayloadCache, Scoring
from teacher_server.served import Served
from teacher_server.status import translated_errors
from teacher_server.student_heads import receive_student_head
from teacher_server.wire import encode_head, numpy_dtype

Context = Any
"""grpc.aio.ServicerContext; its stubs lack abort_with_status."""

Message = TypeVar("Message")

_MAX_CLIENT_CHARACTERS = 200
_FINISH_REASONS = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


class TeacherServicer(TeacherServiceServicer):
    """Cancelled calls and calls past their deadline end as asyncio cancellations, which free the engine."""

    def __init__(
        self, models: Models, *, admission: Admission, metrics: TeacherMetrics, cache: PayloadCache | None = None
    ) -> None:
        self._models = models
        self._metrics = metrics
        self._admission = admission
        self._cache = cache
        self._scorings: WeakKeyDictionary[Served, Scoring] = WeakKeyDictionary()

    def add_to(self, server: Any) -> None:
        """Let ``server`` answer this service's calls."""
        add_TeacherServiceServicer_to_server(self, server)
        # Labels come serialised: the same bytes go to the cache and to all who ask for them at the same time.
        as_it_is = grpc.unary_stream_rpc_method_handler(
            self.ScoreSequences, request_deserializer=pb.ScoreSequencesRequest.FromString
        )
        server.add_registered_method_handlers(SERVICE_NAME, {"ScoreSequences": as_it_is})

    async def GetTeacher(self, request: pb.GetTeacherRequest, context: Context) -> pb.GetTeacherResponse:  # noqa: N802
        async with translated_errors(context):
            checked = self._models.named(request.model)
            engine, card = self._models.current.engine, checked.card
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
                max_draws=MAX_DRAWS,
                label_dtype=tensor_type(numpy_dtype(checked.label_dtype)),
                max_sequences=MAX_SEQUENCES,
                probe_ids=[pb.TokenIds(ids=engine.tokenize(text)) for text in request.probe_texts],
                engine=card.engine,
                generates=card.generates,
                special_token_ids=card.special_token_ids,
                determinism_spread=checked.determinism_spread,
                release=release(),
                label_format=LABEL_FORMAT,
            )
        return pb.GetTeacherResponse()

    async def GetLmHead(self, request: pb.GetLmHeadRequest, context: Context) -> None:  # noqa: N802
        async with translated_errors(context):
            served = self._models.current
            check_model(request.model, request.fingerprint, served.checked.card)
            parts = encode_head(served.engine.lm_head())
            while (part := await asyncio.to_thread(_next_part, parts)) is not None:
                await context.write(part)

    async def ScoreSequences(self, request: pb.ScoreSequencesRequest, context: Context) -> None:  # noqa: N802
        async with translated_errors(context):
            with self._models.in_use(request.fingerprint) as served:
                sequences, options = await asyncio.to_thread(
                    read_score_request,
                    request,
                    served.checked.card,
                    student_heads=served.engine.student_heads,
                    state_bytes=numpy_dtype(served.checked.label_dtype).itemsize,
                )
                answers = self._scoring(served).score(sequences, options, client=client_of(context))
                async with aclosing(answers):
                    async for message in answers:
                        await context.write(message)

    async def GenerateSequences(self, request: pb.GenerateSequencesRequest, context: Context) -> None:  # noqa: N802
        async with translated_errors(context):
            with self._models.in_use() as served:
                prompts, options = await asyncio.to_thread(read_generate_request, request, served.checked.card)
                answers = self._scoring(served).generate(prompts, options, client=client_of(context))
                async with aclosing(answers):
                    async for continuation in answers:
                        await context.write(
                            pb.GenerateSequencesResponse(
                                id=continuation.id,
                                token_ids=continuation.token_ids,
                                finish_reason=_FINISH_REASONS[continuation.finish_reason],
                            )
                        )

    async def PutStudentHead(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.PutStudentHeadRequest], context: Context
    ) -> pb.PutStudentHeadResponse:
        async with translated_errors(context):
            with self._models.in_use() as served:
                heads, vocab_size = served.engine.student_heads, served.checked.card.vocab_size
                await receive_student_head(request_iterator, heads, vocab_size=vocab_size)
        return pb.PutStudentHeadResponse()

    async def LoadModel(self, request: pb.LoadModelRequest, context: Context) -> pb.LoadModelResponse:  # noqa: N802
        async with translated_errors(context):
            card = (await self._models.load(request.model)).card
            return pb.LoadModelResponse(model=card.model, fingerprint=card.fingerprint)
        return pb.LoadModelResponse()

    def _scoring(self, served: Served) -> Scoring:
        """What is under way with these weights."""
        if served not in self._scorings:
            label_dtype = served.checked.label_dtype
            served.engine.watch_batches(self._metrics.batch_computed)
            self._scorings[served] = Scoring(
                served.engine, label_dtype=label_dtype, admission=self._admission, cache=self._cache
            )
        return self._scorings[served]


def _next_part(parts: Iterator[Message]) -> Message | None:
    return next(parts, None)


def client_of(context: Context) -> str:
    """Whose share a call counts for: the name it gives itself in CLIENT_KEY, else the address it comes from."""
    for key, value in context.invocation_metadata() or ():
        if key == CLIENT_KEY and value:
            return f"name {value[:_MAX_CLIENT_CHARACTERS]}"
    # Without the port, so that more connections bring no larger share.
    return f"address {context.peer().rpartition(':')[0]}"
