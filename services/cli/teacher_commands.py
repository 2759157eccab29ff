"""``smoothkd teacher`` and ``smoothkd load-teacher``: serve soft labels, and change what is served."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from services.cli.option_groups import taking

Engine = Annotated[str, typer.Option(help="What computes: auto, transformers, vllm, mock.")]
VLLM = typer.Option(help="As vLLM names it.", rich_help_panel="vLLM")


@dataclass(frozen=True, kw_only=True)
class TeacherArguments:
    """``smoothkd teacher`` as it was called; see TeacherOptions for what each means."""

    model: Annotated[str, typer.Option(help="Directory or hub id of the teacher, or directory of a LoRA adapter.")]
    base: Annotated[str | None, typer.Option(help="Of an adapter: its model, where it does not name it.")] = None
    revision: Annotated[str | None, typer.Option(help="Revision on the hub.")] = None
    engine: Engine = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto"
    max_length: Annotated[int | None, typer.Option(min=2, help="Longest sequence in tokens.")] = None
    label_dtype: Annotated[str, typer.Option(help="Type of hidden states on the wire; auto has 16 bits.")] = "auto"
    allow_models_below: Annotated[
        list[Path] | None,
        typer.Option(help="Where other weights may be loaded from, besides the data directory; repeatable."),
    ] = None
    tensor_parallel_size: Annotated[int, VLLM] = 1
    pipeline_parallel_size: Annotated[int, VLLM] = 1
    quantization: Annotated[str | None, VLLM] = None
    gpu_memory_utilization: Annotated[float, VLLM] = 0.8
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model; read it first.")
    ] = False
    metrics_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Serve Prometheus metrics here.")] = None
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="How long a stopping teacher lets calls under way finish.")
    ] = 20.0
    client_mib: Annotated[
        int,
        typer.Option(min=1, help="Memory for one student's labels under way; more keeps a fast GPU busy with one."),
    ] = 14
    generation: Annotated[
        bool, typer.Option("--generation", help="With vLLM: also decode, for sequence level, in a second engine.")
    ] = False
    max_lora_rank: Annotated[
        int, typer.Option(min=0, help="Largest LoRA adapter to be loaded later.", rich_help_panel="vLLM")
    ] = 0


@taking(TeacherArguments)
def teacher(given: TeacherArguments) -> None:
    """Serve a teacher's soft labels over gRPC."""
    from services.contract.settings import load_settings
    from teacher_server.admission import Limits
    from teacher_server.server import TeacherOptions, serve
    from teacher_server.vllm_options import VllmOptions

    options = TeacherOptions(
        model=given.model,
        revision=given.revision,
        base=given.base,
        allow_models_below=tuple(given.allow_models_below or ()),
        engine=given.engine,
        dtype=given.dtype,
        device=given.device,
        max_length=given.max_length,
        label_dtype=given.label_dtype,
        trust_remote_code=given.trust_remote_code,
        metrics_port=given.metrics_port,
        drain_seconds=given.drain_seconds,
        limits=Limits(held_bytes_per_client=given.client_mib * 2**20),
        vllm=VllmOptions(
            tensor_parallel_size=given.tensor_parallel_size,
            pipeline_parallel_size=given.pipeline_parallel_size,
            quantization=given.quantization,
            gpu_memory_utilization=given.gpu_memory_utilization,
            generation=given.generation,
            max_lora_rank=given.max_lora_rank,
        ),
    )
    serve(load_settings(), options)


def load_teacher(
    model: Annotated[str, typer.Argument(help="Directory of a checkpoint or LoRA adapter; empty: as at the start.")],
) -> None:
    """Have the running teacher serve other weights, without a restart."""
    from services.contract.settings import load_settings
    from services.contract.teacher_channel import teacher_access
    from student_trainer.teacher_client import TeacherClient

    settings = load_settings()
    name = str(Path(model).absolute()) if model and Path(model).is_dir() else model
    with TeacherClient(settings.resolved_teacher_address, access=teacher_access(settings)) as client:
        client.load_model(name)
        info = client.describe()
    typer.echo(f"{info.model} (fingerprint {info.fingerprint})")
