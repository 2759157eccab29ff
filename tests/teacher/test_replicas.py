"""Several teachers behind one address."""

from services.contract.sequences import LabelOptions
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from student_trainer.teacher_client import TeacherClient
from teacher_server.server import TeacherOptions
from tests.teacher.serving import long_sequences, running_teacher


def mock(vocab_size: int) -> TeacherOptions:
    return TeacherOptions(model=str(vocab_size), engine="mock", port=0)


def test_requests_go_to_every_replica_in_turn():
    # Two different models, so that the answer says who gave it.
    with (
        running_teacher(mock(300)) as first,
        running_teacher(mock(301)) as second,
        TeacherClient(f"ipv4:{first},{second}") as client,
    ):
        answers = [client._stub.GetTeacher(pb.GetTeacherRequest(), wait_for_ready=True).model for _ in range(20)]
    assert {"300", "301"} == set(answers[-10:])


def test_a_lost_replica_loses_no_sequence():
    with running_teacher(mock(300)) as first:
        with running_teacher(mock(300)) as second, TeacherClient(f"ipv4:{first},{second}") as client:
            assert len(list(client.score(long_sequences(3), LabelOptions()))) == 3
        with TeacherClient(f"ipv4:{first},{second}") as client:
            for _ in range(4):
                scored = sorted(answer.id for answer in client.score(long_sequences(3), LabelOptions()))
                assert scored == ["s0", "s1", "s2"]
