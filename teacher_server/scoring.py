"""One request becomes its answers: from the cache, from a computation under way for another, or from the engine."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, aclosing
from typing import Any, Protocol, TypeVar

import numpy as np

from services.contract.errors import OverloadedError, SmoothKDError
from services.contract.sequences import Continuation, DecodeOptions, LabelOptions, Prompt, TokenSequence
from services.contract.soft_labels import ScoredSequence, hash_sequence
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.labels.cache import label_key
from teacher_server.admission import Admission, Stream
from teacher_server.calls import note_labelled
from teacher_server.engine import Engine, logits_not_finite
from teacher_server.fair_queue import FairQueue
from teacher_server.flights import Flight, Flights, Payload
from teacher_server.sizes import label_bytes
from teacher_server.wire import encode_scored, numpy_dtype

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT", TokenSequence, Prompt)
ResultT = TypeVar("ResultT")

_OVERHEAD_BYTES = 1024

_REQUEST_BYTES_PER_NUMBER = 6
"""Of token ids and positions: 4 in the message, the rest in the bytes it was read from, which gRPC keeps as long."""


class PayloadCache(Protocol):
    """Labels in their wire form by key; both methods block, and neither fails because of a disk."""

    def get(self, key: str) -> bytes | None: ...

    def put(self, key: str, payload: bytes) -> None: ...


class Scoring:
    """Answers requests with what ``engine`` computes and ``cache`` keeps; belongs to one event loop.

    ``label_dtype``: in which hidden states travel.
    """

    def __init__(
        self, engine: Engine, *, label_dtype: str, admission: Admission, cache: PayloadCache | None = None
    ) -> None:
        self.scores = FairQueue(engine.score_capacity)
        self.decodes = FairQueue(engine.decode_capacity)
        self._engine = engine
        self._card = engine.describe()
        self._label_dtype = label_dtype
        self._admission = admission
        self._cache = cache
        self._flights = Flights()
        # Labels exist in several copies while they are turned into a message.
        self._encoding = asyncio.Lock()

    async def score(
        self, sequences: Sequence[TokenSequence], options: LabelOptions, *, client: str
    ) -> AsyncGenerator[bytes, None]:
        """A ScoreSequencesResponse per sequence, serialised, as each is there.

        OverloadedError comes before any answer, or after those from the cache, where there is no room for what has to
        be computed; the error of a sequence that failed comes after all others were answered. Closing the iterator
        frees the work.
        """

        async def answer(sequence: TokenSequence, stream: Stream) -> bytes:
            payload = await self._payload(sequence, options, stream)
            # Protobuf messages that follow each other are one message with the fields of both.
            head = pb.ScoreSequencesResponse(id=sequence.id, from_cache=payload.from_cache)
            note_labelled(
                encoding=options.encoding, positions=len(sequence.label_positions), from_cache=payload.from_cache
            )
            return head.SerializeToString() + payload.data

        # Read once: a head that makes room meanwhile must not change what was counted.
        student_hidden_size = self._engine.student_heads.width_if_here(options.student_head)

        def size(sequence: TokenSequence) -> int:
            return self._label_bytes(sequence, options, student_hidden_size=student_hidden_size)

        # Those of like length share batches, and what needs most memory shows at once.
        longest_first = sorted(sequences, key=_tokens, reverse=True)
        numbers = sum(_tokens(sequence) + len(sequence.label_positions) for sequence in sequences)
        with self._stream(client, longest_first, tokens=_tokens, numbers=numbers) as stream:
            if self._cache is None:
                stream.reserve()
            async with aclosing(_as_they_come(longest_first, answer, stream, size=size, tokens=_tokens)) as answers:
                async for message in answers:
                    yield message

    async def generate(
        self, prompts: Sequence[Prompt], options: DecodeOptions, *, client: str
    ) -> AsyncGenerator[Continuation, None]:
        """The continuation of each prompt as it ends; errors as with ``score``."""

        def tokens(prompt: Prompt) -> int:
            return _tokens(prompt) + options.max_new_tokens

        async def answer(prompt: Prompt, stream: Stream) -> Continuation:
            async with self.decodes.turn(client, tokens=tokens(prompt)):
                return await self._engine.generate(Prompt(id=prompt.id, token_ids=list(prompt.token_ids)), options)

        def size(prompt: Prompt) -> int:
            # Of those that are unread, most are far shorter than they might have been.
            return _OVERHEAD_BYTES + 8 * options.max_new_tokens

        longest_first = sorted(prompts, key=_tokens, reverse=True)
        numbers = sum(map(_tokens, prompts))
        with self._stream(client, longest_first, tokens=tokens, numbers=numbers) as stream:
            stream.reserve()
            async with aclosing(_as_they_come(longest_first, answer, stream, size=size, tokens=tokens)) as answers:
                async for continuation in answers:
                    yield continuation

    def _stream(
        self, client: str, items: Sequence[ItemT], *, tokens: Callable[[ItemT], int], numbers: int
    ) -> AbstractContextManager[Stream]:
        return self._admission.stream(
            client,
            sequences=len(items),
            tokens=sum(map(tokens, items)),
            request_bytes=_REQUEST_BYTES_PER_NUMBER * numbers,
        )

    async def _payload(self, sequence: TokenSequence, options: LabelOptions, stream: Stream) -> Payload:
        key = label_key(
            fingerprint=self._card.fingerprint,
            sequence_hash=hash_sequence(sequence.token_ids, sequence.label_positions),
            options=options,
            label_dtype=self._label_dtype,
        )

        def produce(flight: Flight) -> Coroutine[Any, Any, Payload]:
            return self._produce(flight, key, sequence, options)

        with self._flights.join(key, produce) as flight:
            if not await flight.is_missing():
                return flight.task.result()
            stream.reserve()
            with flight.lined_up(self.scores, stream.client, tokens=_tokens(sequence)):
                return await asyncio.shield(flight.task)

    async def _produce(self, flight: Flight, key: str, sequence: TokenSequence, options: LabelOptions) -> Payload:
        if self._cache is not None:
            data = await asyncio.to_thread(self._cache.get, key)
            if data is not None:
                return Payload(data=data, from_cache=True)
        flight.announce_miss()
        async with flight.place():
            # Under the name of no request, for it may be shared.
            scored = await self._engine.score(_plain(sequence), options)
        async with self._encoding:
            data = await asyncio.to_thread(_encode, scored, self._label_dtype)
        if self._cache is not None:
            await asyncio.to_thread(self._cache.put, key, data)
        return Payload(data=data, from_cache=False)

    def _label_bytes(self, sequence: TokenSequence, options: LabelOptions, *, student_hidden_size: int) -> int:
        computed, sent = numpy_dtype(self._card.weights_dtype), numpy_dtype(self._label_dtype)
        return _OVERHEAD_BYTES + label_bytes(
            options,
            positions=len(sequence.label_positions),
            vocab_size=self._card.vocab_size,
            hidden_size=self._card.hidden_size,
            student_hidden_size=student_hidden_size,
            state_bytes=max(computed.itemsize, sent.itemsize),
        )


async def _as_they_come(
    items: Sequence[ItemT],
    answer: Callable[[ItemT, Stream], Coroutine[Any, Any, ResultT]],
    stream: Stream,
    *,
    size: Callable[[ItemT], int],
    tokens: Callable[[ItemT], int],
) -> AsyncGenerator[ResultT, None]:
    """Answers in completion order, begun as far as the stream may hold more; the first failure after all of them."""
    waiting = deque(items)
    under_way: dict[asyncio.Task[ResultT], ItemT] = {}
    arrivals: asyncio.Queue[asyncio.Task[ResultT]] = asyncio.Queue()
    failures: list[SmoothKDError] = []
    try:
        while waiting or under_way:
            while waiting and stream.may_hold(size(waiting[0])):
                item = waiting.popleft()
                stream.hold(size(item))
                task = asyncio.get_running_loop().create_task(answer(item, stream))
                under_way[task] = item
                task.add_done_callback(arrivals.put_nowait)
            task = await arrivals.get()
            item = under_way.pop(task)
            stream.finish(tokens=tokens(item))
            error = task.exception()
            if error is None:
                yield task.result()
            else:
                failures.append(_failed(item, error))
            del task
            stream.hold(-size(item))
        if failures:
            # What is to be asked again later says nothing about what fails for good.
            raise min(failures, key=lambda failure: isinstance(failure, OverloadedError))
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


def _encode(scored: ScoredSequence, label_dtype: str) -> bytes:
    # A token may have no probability (-inf), but one that is no number means that the labels are none either.
    if np.isnan(scored.token_logprobs_P).any():
        raise logits_not_finite()
    return encode_scored(scored, label_dtype=label_dtype).SerializeToString()


def _plain(sequence: TokenSequence) -> TokenSequence:
    """Without an id, and with lists in place of a message's fields."""
    return TokenSequence(id="", token_ids=list(sequence.token_ids), label_positions=list(sequence.label_positions))


def _failed(item: TokenSequence | Prompt, error: BaseException) -> SmoothKDError:
    if isinstance(error, OverloadedError):
        return error
    if not isinstance(error, SmoothKDError):
        # To the log only: a client gets the words alone.
        logger.error("sequence %r failed", item.id, exc_info=error)
        error = SmoothKDError(str(error) or type(error).__name__, fix="Look at the teacher's log.")
    return type(error)(
        f"sequence {item.id!r} failed: {error.what}",
        fix=error.fix or "Look at the teacher's log.",
        details={**error.details, "sequence_id": item.id},
    )


def _tokens(item: TokenSequence | Prompt) -> int:
    return len(item.token_ids)
