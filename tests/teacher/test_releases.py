"""Teachers and students of different releases: what differs in size is read, what cannot be read is told."""

import contextlib
import re
from collections.abc import Iterator
from concurrent import futures
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from services.contract.errors import HandshakeError, LabelMismatchError
from services.contract.lm_head import LmHead
from services.contract.release import LABEL_FORMAT, release
from services.contract.sequences import LabelOptions, TokenSequence
from services.contract.settings import Settings
from services.contract.soft_labels import ExactLabels, ScoredSequence, encode_labels, hash_sequence, log_softmax
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.teacher.v1.teacher_service_pb2_grpc import (
    TeacherServiceServicer,
    add_TeacherServiceServicer_to_server,
)
from student_trainer.alignment import verify_token_logprobs
from student_trainer.teacher_client import TeacherClient
from teacher_server.server import TeacherOptions
from tests.teacher.serving import running_teacher

random = np.random.default_rng(7)
HEAD = LmHead(weight_VD=random.standard_normal((50, 4)).astype(np.float32))
HIDDEN = random.standard_normal((40, 4)).astype(np.float32)
SEQUENCE = TokenSequence(
    id="s", token_ids=[(7 * place * place + 3) % 50 for place in range(41)], label_positions=list(range(1, 41))
)
ALL_LOGPROBS = log_softmax(HIDDEN.astype(np.float64) @ HEAD.weight_VD.T)[np.arange(40), SEQUENCE.token_ids[1:]].astype(
    np.float32
)


class OtherRelease(TeacherServiceServicer):
    """A teacher that introduces itself as ``words`` say, and tells the log-probabilities of these tokens alone."""

    def __init__(self, told: list[int], **words: Any) -> None:
        self.told = told
        self.words = words

    def GetTeacher(self, request: Any, context: Any) -> pb.GetTeacherResponse:  # noqa: N802
        return pb.GetTeacherResponse(
            model="m", vocab_size=50, hidden_size=4, max_length=99, max_sequences=16, encodings=[1], **self.words
        )

    def ScoreSequences(self, request: Any, context: Any) -> Iterator[pb.ScoreSequencesResponse]:  # noqa: N802
        yield encode_labels(
            ScoredSequence(
                id="s",
                sequence_hash=hash_sequence(SEQUENCE.token_ids, SEQUENCE.label_positions),
                token_logprobs_P=ALL_LOGPROBS[self.told],
                labels=ExactLabels(hidden_ND=HIDDEN),
            )
        )


@contextlib.contextmanager
def served(servicer: OtherRelease) -> Iterator[TeacherClient]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    add_TeacherServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with TeacherClient(f"127.0.0.1:{port}", patience_seconds=2) as client:
        yield client
    server.stop(0).wait()


@pytest.mark.parametrize(
    "told", [[0], [0, 39], [0, 13, 26, 39], [0, 6, 11, 17, 22, 28, 33, 39], list(range(40))], ids=len
)
@pytest.mark.parametrize("words", [{}, {"release": "9.9", "label_format": 1}], ids=["silent", "9.9"])
def test_a_teacher_may_tell_more_or_fewer_tokens_logprobs(told: list[int], words: dict[str, Any]) -> None:
    with served(OtherRelease(told, **words)) as client:
        (scored,) = client.score([SEQUENCE])
        assert client.describe().release == words.get("release", "")
    assert verify_token_logprobs(scored, SEQUENCE, head=HEAD) < 1e-5
    # Compared at the positions they are of: any other position of these is far off.
    one_off = replace(scored, labels=ExactLabels(hidden_ND=np.roll(HIDDEN, 1, axis=0)))
    with pytest.raises(LabelMismatchError, match="differs by"):
        verify_token_logprobs(one_off, SEQUENCE, head=HEAD)


@pytest.mark.parametrize("told", [[], [*range(40), 0]], ids=len)
@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ({}, rf"smoothkd \(a release too old to say which\), this student {release()}: let both run the newer"),
        ({"release": "0.0.9"}, rf"smoothkd 0\.0\.9, this student {release()}: let both run the newer"),
        ({"release": release(), "label_format": LABEL_FORMAT}, "^The answer is damaged; restart the teacher"),
    ],
)
def test_an_answer_that_cannot_be_read_names_both_releases(told: list[int], words: dict[str, Any], fix: str) -> None:
    with served(OtherRelease(told, **words)) as client, pytest.raises(LabelMismatchError) as caught:
        list(client.score([SEQUENCE]))
    assert f"[40], with {len(told)} log-probabilities" in caught.value.what
    assert re.search(fix, caught.value.fix)


def test_a_newer_format_of_labels_is_refused_before_any_are_asked_for() -> None:
    newer = OtherRelease([0], release="7.0.1", label_format=LABEL_FORMAT + 1)
    with served(newer) as client, pytest.raises(HandshakeError, match="this student is the older one") as caught:
        client.describe()
    assert f"m runs smoothkd 7.0.1 and sends labels of format {LABEL_FORMAT + 1}" in caught.value.what
    assert f"this student runs {release()} and reads format {LABEL_FORMAT}" in caught.value.what
    assert caught.value.fix.startswith("Install smoothkd 7.0.1 for the student")


@pytest.mark.parametrize("words", [{}, {"release": "0.1.0", "label_format": 1}])
def test_an_older_format_of_labels_is_refused(words: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("student_trainer.releases.LABEL_FORMAT", 2)
    monkeypatch.setattr("student_trainer.releases.release", lambda: "0.2.0")
    older = OtherRelease([0], **words)
    with served(older) as client, pytest.raises(HandshakeError, match="the teacher is the older one") as caught:
        client.describe()
    assert f"smoothkd {words.get('release', '(a release too old to say which)')} and sends" in caught.value.what
    assert caught.value.fix.startswith("Start the teacher with smoothkd 0.2.0")


def test_labels_in_the_cache_of_a_release_that_told_more_are_served_and_fit(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [(31 * place) % 290 for place in range(60)]
    sequence = TokenSequence(id="x", token_ids=ids, label_positions=list(range(1, 60)))
    options = TeacherOptions(model=str(tiny_model), engine="mock", port=0)
    settings = Settings(data_dir=tmp_path, label_cache_gib=1)
    with monkeypatch.context() as former, running_teacher(options, settings=settings) as address:
        former.setattr("services.contract.soft_labels.CHECKED_POSITIONS", 32)
        with TeacherClient(address) as client:
            (computed,) = client.score([sequence])
    with running_teacher(options, settings=settings) as address, TeacherClient(address) as client:
        (cached,) = client.score([sequence])
        (fresh,) = client.score([replace(sequence, token_ids=[1, *ids[1:]])], LabelOptions(encoding="exact"))
        verify_token_logprobs(cached, sequence, head=client.fetch_lm_head())
    assert (computed.from_cache, cached.from_cache, fresh.from_cache) == (False, True, False)
    assert [len(each.token_logprobs_P) for each in (computed, cached, fresh)] == [32, 32, 8]


def test_a_teacher_says_its_release_and_format(mock_address: str) -> None:
    with grpc.insecure_channel(mock_address) as channel:
        call = channel.unary_unary(
            "/teacher.v1.TeacherService/GetTeacher",
            request_serializer=pb.GetTeacherRequest.SerializeToString,
            response_deserializer=pb.GetTeacherResponse.FromString,
        )
        answer = call(pb.GetTeacherRequest(), timeout=10)
    assert (answer.release, answer.label_format) == (release(), LABEL_FORMAT)
