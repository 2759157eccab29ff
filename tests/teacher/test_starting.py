"""How a server starts and stops, and when it refuses to serve."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    PretrainedConfig,
    T5Config,
    ViTConfig,
)

from services.contract.errors import (
    InvalidInputError,
    PortInUseError,
    TeacherError,
    TeacherUnavailableError,
    UnsupportedError,
)
from services.contract.settings import Settings
from student_trainer.teacher_client import TeacherClient
from teacher_server.server import TeacherOptions
from tests.teacher.serving import free_port, health_of, long_sequences, running_teacher, teacher_process, wait_until


def test_a_taken_port_is_refused(mock_address: str) -> None:
    port = int(mock_address.split(":")[1])
    options = TeacherOptions(model="300", engine="mock", port=port)
    with pytest.raises(PortInUseError, match=f"listens on 127.0.0.1:{port}"), running_teacher(options):
        pass


def test_an_address_of_another_machine_is_refused() -> None:
    options = TeacherOptions(model="300", engine="mock", host="192.0.2.1", port=0)
    guarded = Settings(teacher_token="t")
    with pytest.raises(InvalidInputError, match="cannot listen on 192"), running_teacher(options, settings=guarded):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_server_after_the_request_under_way(number: signal.Signals) -> None:
    port = free_port()
    options = {"model": "300", "engine": "mock", "port": port, "mock_seconds": 0.02}
    with teacher_process(options) as process, TeacherClient(f"127.0.0.1:{port}", patience_seconds=60) as client:
        client.describe()
        stream = client.score(long_sequences(40))
        next(stream)
        os.kill(process.pid, number)
        assert len(list(stream)) == 39
        assert process.wait(15) == 0
    assert health_of(f"127.0.0.1:{port}") == "UNAVAILABLE"


def test_while_the_model_loads_the_server_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from teacher_server import models

    release = threading.Event()
    choose = models.engine_source
    monkeypatch.setattr(models, "engine_source", lambda *inputs: (release.wait(60), choose(*inputs))[1])
    port = free_port()
    address = f"127.0.0.1:{port}"
    seen = []

    def look() -> None:
        wait_until(lambda: health_of(address) == "NOT_SERVING")
        with TeacherClient(address, patience_seconds=0) as client:
            try:
                client.describe()
            except TeacherUnavailableError as error:
                seen.append(error.what)
            finally:
                release.set()

    watcher = threading.Thread(target=look)
    watcher.start()
    with running_teacher(TeacherOptions(model="300", engine="mock", port=port)):
        assert health_of(address) == "SERVING"
    watcher.join()
    assert seen == [f"the teacher at {address} is starting or stopping"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("architecture", "forgotten", "as_if"),
    [("granite-scaled", "logit_scale", 1.0), ("gemma2-soft-cap", "soft_cap", 0.0)],
)
def test_a_teacher_whose_labels_are_not_its_own_refuses_to_serve(
    architecture: str,
    forgotten: str,
    as_if: float,
    dtype: str,
    model_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from teacher_server import torch_head

    options = TeacherOptions(model=str(model_of(architecture)), engine="transformers", dtype=dtype, port=0)
    with running_teacher(options):
        pass
    monkeypatch.setattr(torch_head, forgotten, lambda config: as_if)
    with pytest.raises(TeacherError, match="would not be its own distribution"), running_teacher(options):
        pass


def test_a_teacher_that_decodes_with_other_weights_refuses_to_serve(
    model_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from teacher_server import transformers_engine

    other = AutoModelForCausalLM.from_pretrained(model_of("qwen3-untied"))
    decode = transformers_engine.decode_batch
    monkeypatch.setattr(transformers_engine, "decode_batch", lambda _, *inputs, **how: decode(other, *inputs, **how))
    options = TeacherOptions(model=str(model_of("llama-untied")), engine="transformers", port=0)
    with pytest.raises(TeacherError, match="would not write what is likeliest"), running_teacher(options):
        pass


@pytest.mark.parametrize(
    "config",
    [
        T5Config(vocab_size=320, d_model=8, d_ff=8, num_layers=1),
        BartConfig(vocab_size=320, d_model=16, encoder_layers=1, decoder_layers=1),
    ],
    ids=["t5", "bart, which transformers also loads as half a decoder"],
)
def test_an_encoder_decoder_is_no_teacher(
    config: PretrainedConfig, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    AutoTokenizer.from_pretrained(model_of("llama-untied")).save_pretrained(tmp_path)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    options = TeacherOptions(model=str(tmp_path), engine="transformers", port=0)
    with pytest.raises(UnsupportedError, match="is an encoder-decoder"), running_teacher(options):
        pass


def test_broken_weights_refuse_to_serve(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_of("llama-untied"))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    import shutil

    directory = tmp_path / "broken"
    shutil.copytree(model_of("llama-untied"), directory)
    model.save_pretrained(directory)
    options = TeacherOptions(model=str(directory), engine="transformers", port=0)
    with pytest.raises(TeacherError, match="not finite"), running_teacher(options):
        pass


def test_a_model_that_writes_no_text_is_no_teacher(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(model_of("llama-untied")).save_pretrained(tmp_path)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    AutoModel.from_config(ViTConfig(image_size=16, patch_size=8, **small)).save_pretrained(tmp_path)
    options = TeacherOptions(model=str(tmp_path), engine="transformers", port=0)
    with pytest.raises(UnsupportedError, match="no causal language model"), running_teacher(options):
        pass


@pytest.mark.parametrize(
    ("field", "value"), [("engine", "vlm"), ("dtype", "int4"), ("label_dtype", "fp8"), ("max_length", 1)]
)
def test_unknown_options_are_refused(field: str, value: object) -> None:
    with pytest.raises(InvalidInputError, match=str(value)):
        TeacherOptions(model="300", **{field: value})


@pytest.mark.parametrize(
    ("field", "value", "words"), [("device", "tpu:7", "tpu"), ("max_length", 257, "256 positions")]
)
def test_options_that_the_model_cannot_meet_are_refused(
    field: str, value: object, words: str, model_of: Callable[[str], Path]
) -> None:
    options = TeacherOptions(model=str(model_of("llama-untied")), engine="transformers", port=0, **{field: value})
    with pytest.raises(InvalidInputError, match=words), running_teacher(options):
        pass
