"""Real servers under load: who gets how much, what is refused, what is computed once, and what cancelling frees."""

import contextlib
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from services.contract.errors import CancelledError, OverloadedError, SmoothKDError
from services.contract.sequences import DecodeOptions, Prompt, TokenSequence
from services.contract.settings import Settings
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.teacher.v1.teacher_service_pb2_grpc import TeacherServiceStub
from student_trainer.teacher_client import TeacherClient
from teacher_server import server as server_module
from teacher_server.admission import Admission, Limits
from teacher_server.batching import BatchingEngine
from teacher_server.mock_engine import MockModel
from teacher_server.server import TeacherOptions
from tests.teacher.serving import REPOSITORY, running_teacher, wait_until


@dataclass
class Watched:
    """The insides of the servers of this test. ``hold`` keeps the engine in its first batch until it is set."""

    admissions: list[Admission] = field(default_factory=list)
    engines: list[BatchingEngine] = field(default_factory=list)
    computed: Counter[tuple[int, ...]] = field(default_factory=Counter)
    holding: threading.Event = field(default_factory=threading.Event)
    hold: threading.Event = field(default_factory=threading.Event)

    @property
    def admission(self) -> Admission:
        return self.admissions[-1]

    def is_idle(self) -> bool:
        admission = self.admission
        books = admission.streams, admission.sequences, admission.tokens, admission.held_bytes, admission.label_bytes
        return (
            not any(books)
            and not admission.clients
            and not any(engine._waiting or engine._computing for engine in self.engines)
        )


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    seen = Watched()
    seen.hold.set()
    score, start = MockModel.score, BatchingEngine.__init__

    def watch_admission(limits: Limits) -> Admission:
        seen.admissions.append(Admission(limits))
        return seen.admissions[-1]

    def watch_engine(engine: BatchingEngine, model: Any) -> None:
        start(engine, model)
        seen.engines.append(engine)

    def watch_score(model: MockModel, work: Any) -> Any:
        if not seen.hold.is_set():
            seen.holding.set()
            assert seen.hold.wait(60)
        seen.computed.update(tuple(sequence.token_ids) for sequence, _ in work)
        if any(13 in sequence.token_ids[:3] for sequence, _ in work):
            raise RuntimeError("device lost")
        return score(model, work)

    monkeypatch.setattr(server_module, "Admission", watch_admission)
    monkeypatch.setattr(BatchingEngine, "__init__", watch_engine)
    monkeypatch.setattr(MockModel, "score", watch_score)
    yield seen
    seen.hold.set()


def sequences(count: int, *, tag: int = 0, length: int = 20) -> list[TokenSequence]:
    """Different from each other, and from those of every other tag."""
    return [
        TokenSequence(
            id=f"{tag}.{index}",
            token_ids=[100 + tag % 100, 100 + index % 100, 100 + index // 100, *range(20, 17 + length)],
            label_positions=[1, length - 1],
        )
        for index in range(count)
    ]


def request(items: Sequence[TokenSequence]) -> pb.ScoreSequencesRequest:
    return pb.ScoreSequencesRequest(
        options=pb.LabelOptions(encoding=pb.ENCODING_EXACT),
        sequences=[
            pb.ScoreSequence(id=item.id, token_ids=item.token_ids, label_positions=item.label_positions)
            for item in items
        ],
    )


def mock(**options: Any) -> TeacherOptions:
    return TeacherOptions(model="300", engine="mock", port=0, **options)


def in_background(work: Any) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_client_with_eight_streams_gets_no_more_than_one_with_one() -> None:
    tokens: Counter[str] = Counter()
    seen: list[Counter[str]] = []
    enough = threading.Event()

    def read(client: TeacherClient, name: str, items: list[TokenSequence]) -> None:
        lengths = {item.id: len(item.token_ids) for item in items}
        with contextlib.closing(client.score(items)) as stream:
            for answer in stream:
                tokens[name] += lengths[answer.id]
                # From when both are at work to when both still are.
                if name == "one" and tokens[name] in (800, 8000):
                    seen.append(Counter(tokens))
                if len(seen) == 2:
                    enough.set()
                if enough.is_set():
                    return

    with (
        running_teacher(mock(mock_seconds=0.002)) as address,
        TeacherClient(address) as one,
        TeacherClient(address) as eight,
    ):
        for client in (one, eight):
            client.describe()
        threads = [
            in_background(lambda tag=tag: read(eight, "eight", sequences(400, tag=tag, length=20))) for tag in range(8)
        ]
        # Twice as long, so that shares are of tokens and not of sequences.
        threads.append(in_background(lambda: read(one, "one", sequences(400, tag=9, length=40))))
        for thread in threads:
            thread.join()
    shares = seen[1] - seen[0]
    assert abs(shares["eight"] / shares["one"] - 1) < 0.2


def test_too_much_for_one_client_is_refused_with_when_to_come_back_and_succeeds_then(watched: Watched) -> None:
    with (
        running_teacher(mock(limits=Limits(sequences_per_client=100))) as address,
        TeacherClient(address, name="greedy", patience_seconds=60) as client,
        TeacherClient(address, name="other") as other,
        grpc.insecure_channel(address) as channel,
    ):
        watched.hold.clear()
        first: list[str] = []
        reading = in_background(lambda: first.extend(answer.id for answer in client.score(sequences(90))))
        wait_until(lambda: watched.admission.sequences == 90)
        call = TeacherServiceStub(channel).ScoreSequences(
            request(sequences(20, tag=1)), metadata=[("smoothkd-client", "greedy")]
        )
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        found, told = rpc_status.from_call(caught.value).details
        assert found.Unpack(info)
        assert told.Unpack(retry)
        assert (info.reason, info.domain) == ("overloaded", "smoothkd")
        assert 1 <= retry.retry_delay.ToTimedelta().total_seconds() <= 60
        with (
            TeacherClient(address, name="greedy", patience_seconds=0.5) as hasty,
            pytest.raises(OverloadedError, match="90 sequences of this client are waiting") as refused,
        ):
            list(hasty.score(sequences(20, tag=1)))
        assert float(refused.value.details["retry_after_seconds"]) >= 1
        # It comes back as often as it is told to; nobody else is held up meanwhile.
        second: list[str] = []
        waiting = in_background(lambda: second.extend(answer.id for answer in client.score(sequences(20, tag=1))))
        third: list[str] = []
        others = in_background(lambda: third.extend(answer.id for answer in other.score(sequences(20, tag=2))))
        wait_until(lambda: watched.admission.sequences == 110)
        watched.hold.set()
        for thread in (reading, waiting, others):
            thread.join()
        wait_until(watched.is_idle)
    for answered, tag, count in ((first, 0, 90), (second, 1, 20), (third, 2, 20)):
        assert sorted(answered) == sorted(item.id for item in sequences(count, tag=tag))


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(sequences=40), "30 sequences with 600 tokens are waiting"),
        (Limits(tokens=700), "30 sequences with 600 tokens are waiting"),
        (Limits(streams=1), "1 in all are under way"),
    ],
)
def test_all_clients_together_are_bounded(limits: Limits, words: str, watched: Watched) -> None:
    with (
        running_teacher(mock(limits=limits)) as address,
        TeacherClient(address) as first,
        TeacherClient(address, patience_seconds=0.2) as second,
    ):
        watched.hold.clear()
        reading = in_background(lambda: list(first.score(sequences(30))))
        wait_until(lambda: watched.admission.sequences == 30)
        with pytest.raises(OverloadedError, match=words):
            list(second.score(sequences(20, tag=1)))
        prompts = [Prompt(id=str(index), token_ids=[index]) for index in range(20)]
        with pytest.raises(OverloadedError, match=words):
            list(second.generate(prompts, DecodeOptions(max_new_tokens=100)))
        watched.hold.set()
        reading.join()
        assert len(list(second.score(sequences(20, tag=1)))) == 20


def test_sixteen_who_ask_for_the_same_are_answered_by_one_computation(watched: Watched) -> None:
    items = sequences(3)
    with running_teacher(mock()) as address, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(TeacherClient(address)) for _ in range(16)]
        for client in clients:
            client.describe()
        watched.computed.clear()
        watched.hold.clear()
        gone = grpc.insecure_channel(address)
        leaving = TeacherServiceStub(gone).ScoreSequences(request(items))
        assert watched.holding.wait(30)
        with ThreadPoolExecutor(16) as threads:
            answers = [threads.submit(lambda client=client: list(client.score(items))) for client in clients]
            wait_until(lambda: watched.admission.streams == 17)
            # The first to ask, whose computation the others have joined.
            leaving.cancel()
            gone.close()
            wait_until(lambda: watched.admission.streams == 16)
            watched.hold.set()
            found = [answer.result(timeout=60) for answer in answers]
        wait_until(watched.is_idle)
    for answered in found:
        assert sorted(answer.id for answer in answered) == [item.id for item in items]
    assert watched.computed == Counter(tuple(item.token_ids) for item in items)


def test_labels_in_the_cache_need_neither_engine_nor_admission(watched: Watched, tmp_path: Path) -> None:
    settings = Settings(label_cache_dir=tmp_path, label_cache_gib=1)
    items = sequences(30)
    options = mock(limits=Limits(sequences=10))
    for start in range(2):
        # The second time after a restart.
        with (
            running_teacher(options, settings=settings) as address,
            grpc.insecure_channel(address) as channel,
            TeacherClient(address, patience_seconds=0.2) as busy,
        ):
            stub = TeacherServiceStub(channel)
            if start == 0:
                first = {answer.id: answer for answer in stub.ScoreSequences(request(items))}
                assert not any(answer.from_cache for answer in first.values())
            watched.computed.clear()
            watched.hold.clear()
            reading = in_background(lambda client=busy, tag=start: list(client.score(sequences(10, tag=5 + tag))))
            wait_until(lambda: watched.admission.sequences == 10)
            again = list(stub.ScoreSequences(request(items), timeout=30))
            assert Counter(answer.id for answer in again) == Counter(first.keys())
            for answer in again:
                assert answer.from_cache
                answer.from_cache = False
                assert answer == first[answer.id]
            # What is not there is refused, but not what is.
            call = stub.ScoreSequences(request([*items, *sequences(1, tag=9, length=10)]), timeout=30)
            assert len([next(call) for _ in items]) == 30
            with pytest.raises(grpc.RpcError) as caught:
                next(call)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            watched.hold.set()
            reading.join()
            wait_until(watched.is_idle)
            assert not set(watched.computed) & {tuple(item.token_ids) for item in items}


def test_what_nobody_waits_for_any_more_is_dropped_by_the_engine(watched: Watched) -> None:
    with running_teacher(mock()) as address:
        watched.computed.clear()
        watched.hold.clear()
        channels = [grpc.insecure_channel(address) for _ in range(3)]
        calls = [TeacherServiceStub(channel).ScoreSequences(request(sequences(60))) for channel in channels]
        wait_until(lambda: watched.admission.streams == 3)
        wait_until(lambda: len(watched.engines[-1]._waiting) >= 8)
        for call in calls:
            call.cancel()
        # What is in a batch already is computed; nothing else is.
        wait_until(lambda: not watched.engines[-1]._waiting)
        watched.hold.set()
        wait_until(watched.is_idle)
        for channel in channels:
            channel.close()
    assert sum(watched.computed.values()) <= 8


def test_a_cancelled_decode_stops_in_the_engine(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = MockModel.generate
    first_step, cancelled = threading.Event(), threading.Event()
    steps: list[int] = []

    def watch_generate(model: MockModel, prompts: Any, options: Any, watch: Any) -> None:
        def after_step() -> None:
            steps.append(1)
            first_step.set()
            assert cancelled.wait(30)

        watch.after_step = after_step
        decode(model, prompts, options, watch)

    monkeypatch.setattr(MockModel, "generate", watch_generate)
    prompts = [Prompt(id=str(index), token_ids=[20 + index]) for index in range(4)]
    with running_teacher(mock()) as address:
        client = TeacherClient(address)
        ended: list[SmoothKDError] = []

        def decode_on() -> None:
            try:
                # No continuation ends before 2000 steps.
                list(client.generate(prompts, DecodeOptions(max_new_tokens=2000, stop_token_ids=(299,))))
            except SmoothKDError as error:
                ended.append(error)

        decoding = in_background(decode_on)
        assert first_step.wait(30)
        client.close()
        wait_until(lambda: watched.admission.streams == 0)
        cancelled.set()
        decoding.join()
        wait_until(watched.is_idle)
    assert isinstance(ended[0], CancelledError)
    assert len(steps) <= 4


def test_a_client_that_is_killed_in_mid_stream_leaves_nothing_behind(watched: Watched) -> None:
    code = (
        "import sys\n"
        "from services.contract.sequences import TokenSequence\n"
        "from student_trainer.teacher_client import TeacherClient\n"
        "ids = [[i % 290, i // 290, *range(288)] for i in range(1000)]\n"
        "places = range(1, 290)\n"
        "items = [TokenSequence(id=str(i), token_ids=row, label_positions=places) for i, row in enumerate(ids)]\n"
        "stream = TeacherClient(sys.argv[1]).score(items)\n"
        "print(next(stream).id, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with running_teacher(mock()) as address:
        process = subprocess.Popen(
            [sys.executable, "-c", code, address],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout.readline().strip().isdecimal()
            wait_until(lambda: watched.admission.held_bytes > 0)
        finally:
            process.kill()
            process.communicate()
        wait_until(watched.is_idle)
        with TeacherClient(address) as client:
            assert len(list(client.score(sequences(5)))) == 5


def test_one_sequence_that_fails_is_named_after_all_others_were_answered(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    items = sequences(40)
    bad = TokenSequence(id="bad", token_ids=[13, 1, 2, 3], label_positions=[1])
    answered: list[str] = []

    def read(client: TeacherClient) -> None:
        for answer in client.score([*items[:20], bad, *items[20:]]):
            answered.append(answer.id)

    with running_teacher(mock()) as address, TeacherClient(address) as client:
        with pytest.raises(SmoothKDError, match="sequence 'bad' failed: device lost") as caught:
            read(client)
        assert caught.value.details["sequence_id"] == "bad"
        assert sorted(answered) == sorted(item.id for item in items)
        assert len(list(client.score(items))) == 40
        wait_until(watched.is_idle)
    # Where it happened, for whoever runs the teacher.
    assert "in watch_score" in caplog.text


def test_random_cancels_and_refusals_lose_and_repeat_nothing(watched: Watched) -> None:
    limits = Limits(sequences_per_client=60, sequences=150, held_bytes_per_client=20_000)
    dice = random.Random(5)
    plans = [[(dice.randint(1, 50), dice.randint(0, 3), dice.random() < 0.4) for _ in range(6)] for _ in range(6)]

    def live(address: str, plan: list[tuple[int, int, bool]]) -> None:
        with TeacherClient(address, patience_seconds=60) as client:
            for count, tag, leaves in plan:
                # Few tags, so that clients ask for the same at the same time.
                items = sequences(count, tag=tag, length=20 + tag)
                stream = client.score(items)
                if leaves:
                    next(stream)
                    stream.close()
                else:
                    assert Counter(answer.id for answer in stream) == Counter(item.id for item in items)

    with running_teacher(mock(mock_seconds=0.001, limits=limits)) as address, ThreadPoolExecutor(6) as threads:
        for outcome in [threads.submit(live, address, plan) for plan in plans]:
            outcome.result(timeout=120)
        wait_until(watched.is_idle)


def test_those_who_were_refused_are_not_remembered() -> None:
    admission = Admission(Limits(streams=1))
    with admission.stream("busy", sequences=1, tokens=1):
        for number in range(3):
            with pytest.raises(OverloadedError), admission.stream(f"refused {number}", sequences=1, tokens=1):
                pass
        assert admission.clients == 1
    assert admission.clients == 0
