"""What ``smoothkd teacher`` makes of its options."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.cli.main import app
from teacher_server.admission import Limits
from teacher_server.options import TeacherOptions
from teacher_server.vllm_options import VllmOptions

EVERY_OPTION = (
    "--model m --base b --revision r --engine mock --dtype float16 --device cuda:1 --max-length 77 "
    "--label-dtype float32 --allow-models-below /one --allow-models-below /two --tensor-parallel-size 2 "
    "--pipeline-parallel-size 3 --quantization fp8 --gpu-memory-utilization 0.5 --trust-remote-code "
    "--metrics-port 9000 --drain-seconds 1.5 --client-mib 3 --generation --max-lora-rank 8"
)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[TeacherOptions]:
    """With what a teacher would be served."""
    got: list[TeacherOptions] = []
    monkeypatch.setattr("teacher_server.server.serve", lambda settings, options: got.append(options))
    return got


def test_every_option_reaches_the_teacher(served: list[TeacherOptions]) -> None:
    result = CliRunner().invoke(app, ["teacher", *EVERY_OPTION.split()])
    assert result.exit_code == 0, result.output
    assert served == [
        TeacherOptions(
            model="m",
            base="b",
            revision="r",
            engine="mock",
            dtype="float16",
            device="cuda:1",
            max_length=77,
            label_dtype="float32",
            allow_models_below=(Path("/one"), Path("/two")),
            trust_remote_code=True,
            metrics_port=9000,
            drain_seconds=1.5,
            limits=Limits(held_bytes_per_client=3 * 2**20),
            vllm=VllmOptions(
                tensor_parallel_size=2,
                pipeline_parallel_size=3,
                quantization="fp8",
                gpu_memory_utilization=0.5,
                generation=True,
                max_lora_rank=8,
            ),
        )
    ]


def test_without_options_a_teacher_is_as_its_options_say(served: list[TeacherOptions]) -> None:
    assert CliRunner().invoke(app, ["teacher", "--model", "m"]).exit_code == 0
    assert served == [TeacherOptions(model="m")]


@pytest.mark.parametrize("wrong", ["", "--model m --max-length 1", "--model m --client-mib 0", "--model m --port 1"])
def test_what_is_no_option_is_refused(wrong: str, served: list[TeacherOptions]) -> None:
    assert CliRunner().invoke(app, ["teacher", *wrong.split()]).exit_code == 2
    assert served == []
