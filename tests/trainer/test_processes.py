"""Runs as processes: killed without warning, and several to one run."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from services.contract.errors import CancelledError, DatasetError, SpecError
from services.contract.settings import Settings
from services.contract.spec import RunSpec
from student_trainer.train import train
from tests.trainer.runs import environment

REPOSITORY = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "services.cli.main", "train"]


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
def test_a_run_of_two_processes_trains_what_one_does(
    make_run: Callable[..., RunSpec], kd_settings: Settings, records_file: Path, tmp_path: Path
) -> None:
    """From the specification alone; on the CPU, with gradients shared through gloo."""
    shared = {"dataset": {"path": str(records_file), "limit": 8}, "alpha": 1.0}
    alone = load_file(train(make_run(**shared), out=tmp_path / "alone", settings=kd_settings) / "model.safetensors")
    spec = make_run(**shared, training={"processes": 2, "checkpoint_steps": 3})
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
def test_the_loss_is_right_with_weights_that_processes_share() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "tests.trainer.sharded_loss"),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the same gradients") == 2


@pytest.mark.parametrize("sharding", [{"fsdp": True}, {"deepspeed": "zero.json"}])
def test_one_process_has_no_other_to_share_weights_with(
    sharding: dict, make_run: Callable[..., RunSpec], settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match="among several processes"):
        train(make_run(training=sharding), out=tmp_path / "run", settings=settings)


@pytest.mark.slow
def test_an_error_in_a_process_of_several_is_the_run_s_error(
    make_run: Callable[..., RunSpec], settings: Settings, tmp_path: Path
) -> None:
    spec = make_run(training={"processes": 2}, dataset={"path": str(tmp_path / "none.jsonl")})
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    done = subprocess.run(
        [*COMMAND, str(run_file), "--out", str(tmp_path / "run")],
        env=environment(settings),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == DatasetError.exit_code
    assert done.stderr.rstrip().splitlines()[-2].startswith("error: ")
    assert "none.jsonl" in done.stderr


@pytest.mark.slow
def test_a_stop_reaches_all_processes_which_go_on_later(
    make_run: Callable[..., RunSpec], settings: Settings, tmp_path: Path
) -> None:
    """SIGTERM saves a checkpoint of one step for all; SIGKILL of whoever waits for them leaves none behind."""
    spec = make_run(training={"processes": 2, "epochs": 200})
    run_file, out = tmp_path / "run.yaml", tmp_path / "run"
    run_file.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    command = [*COMMAND, str(run_file), "--out", str(out)]

    def start() -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
        with (tmp_path / "log").open("ab") as log:
            process = subprocess.Popen(command, env=environment(settings), stdout=subprocess.DEVNULL, stderr=log)
        deadline = time.monotonic() + 120
        while not (out / "run.yaml").exists() or len(psutil.Process(process.pid).children(recursive=True)) < 3:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
        return process, psutil.Process(process.pid).children(recursive=True)

    process, family = start()
    process.terminate()
    assert process.wait(120) == CancelledError.exit_code, (tmp_path / "log").read_text()
    (checkpoint,) = out.glob("checkpoints/checkpoint-*")
    assert {"whole.json", "rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.iterdir()}
    assert not psutil.wait_procs(family, timeout=30)[1]

    process, family = start()
    process.kill()
    process.wait()
    assert not psutil.wait_procs(family, timeout=30)[1]


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
