"""The student's side of the teacher service: a blocking client that checks whatever it is told.

Requests outlive the teacher: while none answers the client asks again, and after a broken stream only for the
sequences that are still missing, so that every sequence arrives exactly once.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc

from services.contract.errors import CancelledError, InvalidInputError, LabelMismatchError, SmoothKDError
from services.contract.lm_head import LmHead
from services.contract.sequences import (
    Continuation,
    DecodeOptions,
    Encoding,
    LabelOptions,
    Prompt,
    TokenSequence,
)
from services.contract.soft_labels import MAX_MESSAGE_BYTES, WIRE_ENCODINGS, ScoredSequence, decode_labels
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.teacher.v1.teacher_service_pb2_grpc import TeacherServiceStub
from student_trainer.alignment import check_scored
from student_trainer.handshake import PROBE_TEXTS, StudentTokenizer, require_shared_tokenizer
from student_trainer.lm_head_cache import cached_lm_head
from student_trainer.teacher_errors import is_worth_another_try, translate

Item = TypeVar("Item", TokenSequence, Prompt)
Answer = TypeVar("Answer", ScoredSequence, Continuation)
Message = TypeVar("Message", pb.ScoreSequencesResponse, pb.GenerateSequencesResponse)

_CHANNEL_OPTIONS = (
    # Replicas behind one name share the work.
    ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A teacher that restarts is back within seconds; the channel's own backoff would grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


@dataclass(frozen=True, kw_only=True)
class TeacherInfo:
    """Who the teacher is. ``vocab_size`` counts real tokens; ``max_length`` is in tokens."""

    model: str
    revision: str
    fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int
    hidden_size: int
    max_length: int
    encodings: tuple[Encoding, ...]
    max_k: int
    max_sequences: int
    engine: str
    generates: bool


class TeacherClient:
    """A teacher at ``address`` (host:port or any gRPC target). Safe to share between threads; close it in the end.

    ``cache_dir`` keeps output heads by fingerprint. ``timeout_seconds`` bounds each request,
    ``patience_seconds`` how long an unreachable teacher is asked again before TeacherUnavailableError.
    """

    def __init__(
        self,
        address: str,
        *,
        cache_dir: Path | None = None,
        timeout_seconds: float = 600.0,
        patience_seconds: float = 120.0,
    ) -> None:
        self.address = address
        self._cache_dir = cache_dir
        self._timeout_seconds = timeout_seconds
        self._patience_seconds = patience_seconds
        self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = TeacherServiceStub(self._channel)
        self._closed = threading.Event()
        self._info: TeacherInfo | None = None

    def __enter__(self) -> "TeacherClient":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End every request under way."""
        self._closed.set()
        self._channel.close()

    def handshake(self, tokenizer: StudentTokenizer, model_name: str = "", encoding: Encoding = "exact") -> TeacherInfo:
        """The teacher, once it is certain to serve ``model_name`` with the student's own tokenizer.

        HandshakeError names every difference; UnsupportedError an encoding that the teacher does not offer.
        """
        response = self._get_teacher(model_name, probe_texts=PROBE_TEXTS)
        self._info = _teacher_info(response)
        require_shared_tokenizer(tokenizer, response, encoding=encoding, encodings=self._info.encodings)
        return self._info

    def describe(self) -> TeacherInfo:
        """The teacher as it was at the first question; no comparison with the student."""
        if self._info is None:
            self._info = _teacher_info(self._get_teacher("", probe_texts=()))
        return self._info

    def fetch_lm_head(self) -> LmHead:
        """The teacher's output head, from disk where an earlier worker left it there."""
        info = self.describe()
        request = pb.GetLmHeadRequest(model=info.model, fingerprint=info.fingerprint)
        head: LmHead = self._patiently(
            lambda: cached_lm_head(
                lambda: self._stub.GetLmHead(request, timeout=self._timeout_seconds),
                fingerprint=info.fingerprint,
                cache_dir=self._cache_dir,
            )
        )
        return head

    def score(
        self, sequences: Iterable[TokenSequence], options: LabelOptions | None = None
    ) -> Iterator[ScoredSequence]:
        """Soft labels of every sequence, each exactly once, as they come; closing the iterator frees the teacher.

        Ids, hash, shapes and finiteness are checked: LabelMismatchError where an answer belongs to other tokens.
        """
        options = options or LabelOptions()
        info = self.describe()
        wire_options = pb.LabelOptions(encoding=WIRE_ENCODINGS[options.encoding])
        if options.encoding == "top_k":
            wire_options.k, wire_options.temperature = options.k, options.temperature

        def request(part: Iterable[TokenSequence]) -> pb.ScoreSequencesRequest:
            return pb.ScoreSequencesRequest(
                model=info.model,
                fingerprint=info.fingerprint,
                options=wire_options,
                sequences=[
                    pb.ScoreSequence(id=item.id, token_ids=item.token_ids, label_positions=item.label_positions)
                    for item in part
                ],
            )

        def read(message: pb.ScoreSequencesResponse, sequence: TokenSequence) -> ScoredSequence:
            scored = decode_labels(message)
            check_scored(scored, sequence, options=options, vocab_size=info.vocab_size, hidden_size=info.hidden_size)
            return scored

        def ask(part: Iterable[TokenSequence]) -> Any:
            return self._stub.ScoreSequences(request(part), timeout=self._timeout_seconds)

        return self._each_once(sequences, ask=ask, read=read)

    def generate(self, prompts: Iterable[Prompt], options: DecodeOptions) -> Iterator[Continuation]:
        """The teacher's continuation of every prompt, each exactly once, as they come."""
        info = self.describe()

        def request(part: Iterable[Prompt]) -> pb.GenerateSequencesRequest:
            return pb.GenerateSequencesRequest(
                model=info.model,
                fingerprint=info.fingerprint,
                prompts=[pb.GeneratePrompt(id=prompt.id, token_ids=prompt.token_ids) for prompt in part],
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                seed=options.seed,
                stop_token_ids=options.stop_token_ids,
            )

        def read(message: pb.GenerateSequencesResponse, prompt: Prompt) -> Continuation:
            stopped = message.finish_reason == pb.FINISH_REASON_STOP
            return Continuation(
                id=prompt.id, token_ids=tuple(message.token_ids), finish_reason="stop" if stopped else "length"
            )

        def ask(part: Iterable[Prompt]) -> Any:
            return self._stub.GenerateSequences(request(part), timeout=self._timeout_seconds)

        return self._each_once(prompts, ask=ask, read=read)

    def _get_teacher(self, model: str, *, probe_texts: Iterable[str]) -> pb.GetTeacherResponse:
        request = pb.GetTeacherRequest(model=model, probe_texts=probe_texts)
        response: pb.GetTeacherResponse = self._patiently(
            lambda: self._stub.GetTeacher(request, timeout=self._timeout_seconds)
        )
        return response

    def _patiently(self, attempt: Callable[[], Any]) -> Any:
        patience = _Patience(self)
        while True:
            self._require_open()
            try:
                return attempt()
            except grpc.RpcError as error:
                patience.wait_or_raise(error)

    def _require_open(self) -> None:
        if self._closed.is_set():
            raise CancelledError("the connection to the teacher was closed while it was in use")

    def _each_once(
        self,
        items: Iterable[Item],
        *,
        ask: Callable[[Iterable[Item]], Any],
        read: Callable[[Message, Item], Answer],
    ) -> Iterator[Answer]:
        missing: dict[str, Item] = {}
        for item in items:
            if item.id in missing:
                raise InvalidInputError(f"the id {item.id!r} is asked for twice", fix="Give every sequence its own id.")
            missing[item.id] = item
        patience = _Patience(self)
        while missing:
            self._require_open()
            asked = dict(list(missing.items())[: self.describe().max_sequences])
            stream = None
            try:
                stream = ask(asked.values())
                for message in stream:
                    if message.id not in asked:
                        raise _unexpected(message.id, missing=False)
                    item = asked.pop(message.id)
                    answer = read(message, item)
                    del missing[item.id]
                    patience.renew()
                    yield answer
            except grpc.RpcError as error:
                patience.wait_or_raise(error)
            else:
                if asked:
                    raise _unexpected(next(iter(asked)), missing=True)
            finally:
                if stream is not None:
                    stream.cancel()


class _Patience:
    """Decides whether a failed request is made again, and waits before it is: 0.1 s, doubling to 5 s."""

    def __init__(self, client: TeacherClient) -> None:
        self._client = client
        self.renew()

    def renew(self) -> None:
        self._pause = 0.1
        self._progressed = True
        self._ends: float | None = None

    def wait_or_raise(self, error: grpc.RpcError) -> None:
        client = self._client
        client._require_open()
        if self._ends is None:
            self._ends = time.monotonic() + client._patience_seconds
        again = is_worth_another_try(error, progressed=self._progressed)
        self._progressed = False
        if not again or time.monotonic() + self._pause > self._ends:
            raise self._translated(error) from error
        client._closed.wait(self._pause)
        self._pause = min(2 * self._pause, 5.0)

    def _translated(self, error: grpc.RpcError) -> SmoothKDError:
        info = self._client._info
        return translate(error, address=self._client.address, model=info.model if info else "")


def _teacher_info(response: pb.GetTeacherResponse) -> TeacherInfo:
    names = {number: name for name, number in WIRE_ENCODINGS.items()}
    return TeacherInfo(
        model=response.model,
        revision=response.revision,
        fingerprint=response.fingerprint,
        tokenizer_fingerprint=response.tokenizer_fingerprint,
        vocab_size=response.vocab_size,
        hidden_size=response.hidden_size,
        max_length=response.max_length,
        encodings=tuple(names[number] for number in response.encodings if number in names),
        max_k=response.max_k,
        max_sequences=response.max_sequences,
        engine=response.engine,
        generates=response.generates,
    )


def _unexpected(sequence_id: str, *, missing: bool) -> LabelMismatchError:
    what = "left out" if missing else "answered unasked, or twice,"
    return LabelMismatchError(f"the teacher {what} sequence {sequence_id!r}", fix="Restart the teacher.")
