"""Runs as processes: killed without warning, and several to one run."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from services.contract.settings import Settings
from services.contract.spec import RunSpec
from student_trainer.train import train

COMMAND = [sys.executable, "-m", "services.cli.main", "train"]


def environment(settings: Settings) -> dict[str, str]:
    return os.environ | {
        "SMOOTHKD_DATA_DIR": str(settings.data_dir),
        "SMOOTHKD_TEACHER_ADDRESS": settings.teacher_address,
        "SMOOTHKD_OFFLINE": "true",
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bits(
    make_run: Callable[..., RunSpec],
    settings: Settings,
    mock_address: str,
    student_model: Path,
    tmp_path: Path,
) -> None:
    """SIGKILL three times, as soon as a further checkpoint appears: in a step, or in the middle of saving."""
    settings = settings.model_copy(update={"teacher_address": mock_address})
    spec = make_run(alpha=0.5, teacher={"model": str(student_model)}, training={"checkpoint_steps": 1, "epochs": 20})
    torch.set_num_threads(1)
    straight = load_file(train(spec, out=tmp_path / "straight", settings=settings) / "model.safetensors")
    run_file, out = tmp_path / "run.yaml", tmp_path / "killed"
    run_file.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    command = [*COMMAND, str(run_file), "--out", str(out)]
    reached = 1
    for _ in range(3):
        process = subprocess.Popen(
            command, env=environment(settings), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 120
        while newest_step(out) <= reached:
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGKILL)
        process.communicate()
        reached = newest_step(out) + 1
        assert not (out / "model").exists()

    subprocess.run(command, env=environment(settings), check=True, capture_output=True, timeout=120)
    resumed = load_file(out / "model" / "model.safetensors")
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name


def newest_step(out: Path) -> int:
    return max((int(path.name.rpartition("-")[2]) for path in out.glob("checkpoints/checkpoint-*")), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_a_run_of_two_processes_trains_what_one_does(
    fsdp: bool, make_run: Callable[..., RunSpec], kd_settings: Settings, records_file: Path, tmp_path: Path
) -> None:
    """From the specification alone; on the CPU, with gradients, or also weights and optimizer, shared through gloo."""
    shared = {"dataset": {"path": str(records_file), "limit": 8}, "alpha": 1.0}
    alone = load_file(train(make_run(**shared), out=tmp_path / "alone", settings=kd_settings) / "model.safetensors")
    spec = make_run(**shared, training={"processes": 2, "fsdp": fsdp, "held_out": 0, "checkpoint_steps": 3})
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    done = subprocess.run(
        [*COMMAND, str(run_file), "--out", str(tmp_path / "together")],
        env=environment(kd_settings),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    together = load_file(tmp_path / "together" / "model" / "model.safetensors")
    assert together.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_two_processes_train_what_one_does(
    make_run: Callable[..., RunSpec], kd_settings: Settings, records_file: Path, tmp_path: Path
) -> None:
    """The same global batches, split over data-parallel ranks on the CPU."""
    spec = make_run(alpha=1.0, dataset={"path": str(records_file), "limit": 8})
    alone = load_file(train(spec, out=tmp_path / "alone", settings=kd_settings) / "model.safetensors")
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [*COMMAND, str(run_file), "--out", str(tmp_path / "together")],
            env=environment(kd_settings)
            | {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=180)
            assert process.returncode == 0, errors.decode()
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    together = load_file(tmp_path / "together" / "model" / "model.safetensors")
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
