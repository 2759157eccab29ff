"""The student's side of the teacher service: a blocking client that checks whatever it is told.

Requests outlive the teacher: while none answers the client asks again, and after a broken stream only for the
sequences that are still missing, so that every sequence arrives exactly once.
"""

import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc

from services.contract.errors import CancelledError, InvalidInputError, StudentHeadMissingError
from services.contract.lm_head import LmHead
from services.contract.sequences import Continuation, DecodeOptions, Encoding, LabelOptions, Prompt, TokenSequence
from services.contract.soft_labels import ScoredSequence, decode_labels
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.teacher.v1.teacher_service_pb2_grpc import TeacherServiceStub
from services.contract.teacher_channel import CLIENT_KEY, TeacherAccess, open_teacher_channel
from student_trainer.alignment import check_scored
from student_trainer.handshake import PROBE_TEXTS, StudentTokenizer, require_shared_tokenizer
from student_trainer.lm_head_cache import cached_lm_head
from student_trainer.loaded_weights import LoadedWeights
from student_trainer.patience import Patience
from student_trainer.releases import blaming_releases, require_readable_labels
from student_trainer.student_head import MOST_REPLICAS, StudentHead
from student_trainer.teacher_errors import told_by_server
from student_trainer.teacher_info import TeacherInfo, teacher_info
from student_trainer.teacher_loading import load_on_every_replica
from student_trainer.teacher_requests import (
    generate_request,
    one_request,
    read_continuation,
    score_request,
    unexpected_answer,
)
from student_trainer.tracing import traced_stream

Item = TypeVar("Item", TokenSequence, Prompt)
Answer = TypeVar("Answer", ScoredSequence, Continuation)
Message = TypeVar("Message", pb.ScoreSequencesResponse, pb.GenerateSequencesResponse)


class TeacherClient:
    """A teacher at ``address``, as ``open_teacher_channel`` takes it. Threads may share it; close it in the end.

    The teacher shares its time fairly between clients of different ``name``; each has one of its own by default.
    ``access`` is what the teacher is shown; ``cache_dir`` keeps output heads by fingerprint. ``timeout_seconds`` bounds
    each request, ``patience_seconds`` how long a teacher that is away or overloaded is asked again before its error.
    """

    def __init__(
        self,
        address: str,
        *,
        name: str = "",
        access: TeacherAccess | None = None,
        cache_dir: Path | None = None,
        timeout_seconds: float = 600.0,
        patience_seconds: float = 120.0,
    ) -> None:
        self.address = address
        self.name = name or uuid.uuid4().hex
        self._access = access or TeacherAccess()
        self._cache_dir = cache_dir
        self._timeout_seconds = timeout_seconds
        self._patience_seconds = patience_seconds
        self._channel = open_teacher_channel(address, access=self._access, metadata=lambda: ((CLIENT_KEY, self.name),))
        self._stub = TeacherServiceStub(self._channel)
        self._closed = threading.Event()
        self._warned: set[str] = set()
        self._info: TeacherInfo | None = None
        self._weights = LoadedWeights(self._load_on_every_replica)
        self._student_head: StudentHead | None = None

    def __enter__(self) -> "TeacherClient":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End every request under way."""
        self._closed.set()
        self._channel.close()

    def load_model(self, model: str) -> str:
        """Have every replica serve the weights that ``model`` names, empty for those at its start; returns their name.

        ``model`` is the teacher's own name, or a directory that the server sees, relative to its data directory or
        absolute. From now on this client asks for these weights alone, and has them loaded again when the teacher went
        over to others meanwhile. Waits for its turn while students use another teacher at the same address.
        """
        name = self._weights.load(model)
        self._info = None
        return name

    def handshake(self, tokenizer: StudentTokenizer, model_name: str = "", encoding: Encoding = "exact") -> TeacherInfo:
        """The teacher, once it is certain to serve ``model_name`` with the student's own tokenizer.

        HandshakeError names every difference; UnsupportedError an encoding that the teacher does not offer.
        """
        response = self._get_teacher(model_name, probe_texts=PROBE_TEXTS)
        self._info = teacher_info(response)
        require_shared_tokenizer(tokenizer, response, encoding=encoding, encodings=self._info.encodings)
        return self._info

    def describe(self) -> TeacherInfo:
        """The teacher as it was at the first question; no comparison with the student."""
        if self._info is None:
            self._info = teacher_info(self._get_teacher("", probe_texts=()))
        return self._info

    def introduction(self) -> pb.GetTeacherResponse:
        """What the teacher says of itself, with the ids of PROBE_TEXTS: enough to compare tokenizers without it."""
        return self._get_teacher(self.describe().model, probe_texts=PROBE_TEXTS)

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

    def use_student_head(self, head: LmHead) -> str:
        """Let projected labels be means of this head; returns its fingerprint for ``LabelOptions.student_head``.

        It goes to the teacher when that says that it does not have it: at first, and after a restart.
        """
        self._student_head = StudentHead(head)
        return self._student_head.fingerprint

    def score(
        self, sequences: Iterable[TokenSequence], options: LabelOptions | None = None
    ) -> Iterator[ScoredSequence]:
        """Soft labels of every sequence, each exactly once, as they come; closing the iterator frees the teacher.

        Ids, hash, shapes and finiteness are checked: LabelMismatchError where an answer belongs to other tokens.
        """
        options = options or LabelOptions()
        info = self.describe()

        def read(message: pb.ScoreSequencesResponse, sequence: TokenSequence) -> ScoredSequence:
            with blaming_releases(info.release):
                scored = decode_labels(message)
                check_scored(
                    scored,
                    sequence,
                    options=options,
                    vocab_size=info.vocab_size,
                    hidden_size=info.hidden_size,
                    student_head=self._student_head,
                )
            return scored

        def ask(part: Iterable[TokenSequence]) -> Any:
            message = score_request(part, info=info, options=options)
            return traced_stream(
                "ScoreSequences",
                lambda more: self._stub.ScoreSequences(message, timeout=self._timeout_seconds, metadata=more),
                sequences=len(message.sequences),
            )

        return self._each_once(sequences, ask=ask, read=read)

    def generate(self, prompts: Iterable[Prompt], options: DecodeOptions) -> Iterator[Continuation]:
        """The teacher's continuation of every prompt, each exactly once, as they come."""
        info = self.describe()

        def ask(part: Iterable[Prompt]) -> Any:
            message = generate_request(part, info=info, options=options)
            return traced_stream(
                "GenerateSequences",
                lambda metadata: self._stub.GenerateSequences(
                    message, timeout=self._timeout_seconds, metadata=metadata
                ),
                sequences=len(message.prompts),
            )

        return self._each_once(prompts, ask=ask, read=read_continuation)

    def _get_teacher(self, model: str, *, probe_texts: Iterable[str]) -> pb.GetTeacherResponse:
        request = pb.GetTeacherRequest(model=model, probe_texts=probe_texts)
        while True:
            response: pb.GetTeacherResponse = self._patiently(
                lambda: self._stub.GetTeacher(request, timeout=self._timeout_seconds)
            )
            require_readable_labels(response)
            if self._weights.are_served(response):
                return response
            self._weights.load_again()

    def _load_on_every_replica(self, model: str) -> pb.LoadModelResponse:
        return load_on_every_replica(
            self.address,
            model,
            access=self._access,
            patience_seconds=self._patience_seconds,
            closed=self._closed,
        )

    def _patiently(self, attempt: Callable[[], Any]) -> Any:
        patience = self._patience()
        while True:
            self._require_open()
            try:
                return attempt()
            except grpc.RpcError as error:
                self._require_open()
                if not self._weights.are_back(error):
                    patience.wait_or_raise(error)
            except ValueError:
                # gRPC's own, where the channel is closed just before a call.
                self._require_open()
                raise

    def _patience(self) -> Patience:
        return Patience(
            seconds=self._patience_seconds,
            address=self.address,
            access=self._access,
            known_model=self._info.model if self._info else "",
            closed=self._closed,
            warned=self._warned,
        )

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
        patience = self._patience()
        while missing:
            self._require_open()
            asked = one_request(missing, max_sequences=self.describe().max_sequences)
            stream = None
            head_sent = self._student_head.times_sent if self._student_head else 0
            try:
                stream = ask(asked.values())
                for message in stream:
                    if message.id not in asked:
                        raise unexpected_answer(message.id, missing=False)
                    item = asked.pop(message.id)
                    answer = read(message, item)
                    del missing[item.id]
                    patience.renew()
                    yield answer
            except grpc.RpcError as error:
                self._require_open()
                sent = self._sent_missing_head(error, patience, missed_at=head_sent)
                if not sent and not self._weights.are_back(error):
                    patience.wait_or_raise(error)
            except ValueError:
                self._require_open()
                raise
            else:
                if asked:
                    raise unexpected_answer(next(iter(asked)), missing=True)
            finally:
                if stream is not None:
                    stream.cancel()

    def _sent_missing_head(self, error: grpc.RpcError, patience: Patience, *, missed_at: int) -> bool:
        """Whether the request failed for want of the student's head, which is there now."""
        head = self._student_head
        told = told_by_server(error)
        if head is None or not isinstance(told, StudentHeadMissingError) or patience.misses >= MOST_REPLICAS:
            return False
        patience.misses += 1
        head.send(
            lambda messages: self._patiently(
                lambda: self._stub.PutStudentHead(messages(), timeout=self._timeout_seconds)
            ),
            missed_at=missed_at,
            misses=patience.misses,
        )
        return True
