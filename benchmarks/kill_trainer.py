"""Trainers killed with SIGKILL at random moments and started again: do they end with the very bits of one left alone?

Every trial is a real ``smoothkd train`` of a tiny student that learns soft labels from a mock teacher's process. It is
killed once, at a moment drawn over the time that the undisturbed run takes behind its start, so that kills hit steps,
checkpoints being written and the final model being saved alike; then it is started again and left to finish.

    python -m benchmarks.kill_trainer --kills 20
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report import report
from benchmarks.serving import REPOSITORY, teacher_process
from services.contract.spec_reading import parse_run
from services.models.tiny import make_tiny_model

RECORDS = 80
EPOCHS = 10
CHECKPOINT_STEPS = 3
PATIENCE_SECONDS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "model", seed=1)
        run_file = write_run(Path(folder), model)
        with teacher_process("--model", str(model), "--engine", "mock") as (address, _):
            trainer = Trainer(run_file, address=address, folder=Path(folder))
            seconds = trainer.measure(Path(folder) / "straight")
            expected = fingerprint(Path(folder) / "straight")
            rows: list[dict[str, Any]] = []
            while len(rows) < arguments.kills:
                out = Path(folder) / f"killed-{len(rows)}"
                after = draw.uniform(0, seconds)
                if not trainer.kill(out, after_seconds=after):
                    continue
                found = describe(out)
                trainer.finish(out)
                same = fingerprint(out) == expected
                rows.append({"kill": len(rows) + 1, "seconds after start-up": after, **found, "same bits": same})
    alike = sum(row["same bits"] for row in rows)
    steps = RECORDS * EPOCHS // 4
    report(
        "kill_trainer",
        title=f"SIGKILL of a trainer of {steps} steps, a checkpoint every {CHECKPOINT_STEPS}, then a restart",
        rows=rows,
        notes=[f"{alike} of {len(rows)} ended with the undisturbed run's weights, bit for bit."],
    )
    if alike < len(rows):
        sys.exit(1)


def write_run(folder: Path, model: Path) -> Path:
    """The specification of a run with soft labels, and its records."""
    data = folder / "records.jsonl"
    with data.open("w", encoding="utf-8") as lines:
        for number in range(RECORDS):
            response = ", ".join(["the harbour master of Ostrel"] * (1 + number % 5))
            record = {"instruction": f"Name {number} ferries.", "context": "", "response": response, "category": "qa"}
            lines.write(json.dumps(record) + "\n")
    spec = parse_run(
        {
            "student": {"model": str(model)},
            "teacher": {"model": str(model)},
            "dataset": {"path": str(data)},
            "alpha": 1.0,
            "learning_rate": 1e-2,
            "batch_size": 4,
            "training": {
                "epochs": EPOCHS,
                "max_length": 256,
                "precision": "fp32",
                "micro_batch_size": 2,
                "checkpoint_steps": CHECKPOINT_STEPS,
            },
        }
    )
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(spec.model_dump(mode="json")), encoding="utf-8")
    return run_file


class Trainer:
    """``smoothkd train RUN_FILE`` as a process of its own, as often as need be."""

    def __init__(self, run_file: Path, *, address: str, folder: Path) -> None:
        self._run_file = run_file
        self._log = folder / "train.log"
        self._environment = os.environ | {
            "SMOOTHKD_DATA_DIR": str(folder / "data"),
            "SMOOTHKD_TEACHER_ADDRESS": address,
            "SMOOTHKD_OFFLINE": "true",
            # The order of sums, and so the last bits, depend on the number of threads.
            "OMP_NUM_THREADS": "1",
        }

    def measure(self, out: Path) -> float:
        """Seconds from the end of start-up until an undisturbed run's model is there."""
        process = self._start(out)
        self._wait_for(out / "run.yaml", process)
        begun = time.monotonic()
        self._wait_for(out / "model", process)
        seconds = time.monotonic() - begun
        self._require_success(process)
        return seconds

    def kill(self, out: Path, *, after_seconds: float) -> bool:
        """Whether the final model was still to come when the moment came; otherwise its directory is moved away."""
        process = self._start(out)
        self._wait_for(out / "run.yaml", process)
        time.sleep(after_seconds)
        process.kill()
        process.wait()
        at_work = not (out / "model").exists()
        if not at_work:
            out.rename(out.with_name(f"{out.name}-too-late-{time.monotonic_ns()}"))
        return at_work

    def finish(self, out: Path) -> None:
        """Start it again and let it end."""
        self._require_success(self._start(out))

    def _start(self, out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "services.cli.main", "train", str(self._run_file), "--out", str(out)]
        with self._log.open("wb") as log:
            return subprocess.Popen(command, cwd=REPOSITORY, env=self._environment, stdout=log, stderr=log)

    def _wait_for(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not path.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise SystemExit(f"the trainer made no {path.name}:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.01)

    def _require_success(self, process: subprocess.Popen[bytes]) -> None:
        if process.wait(PATIENCE_SECONDS) != 0:
            raise SystemExit(f"the trainer failed:\n{self._log.read_text()[-3000:]}")


def describe(out: Path) -> dict[str, Any]:
    """What a killed trainer left behind."""
    folders = sorted(out.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in folders if (path / "whole.json").exists()]
    half_written = "model" if (out / "model.tmp").exists() else "checkpoint" if len(whole) < len(folders) else "-"
    return {"last checkpoint": whole[-1].name if whole else "none", "half-written": half_written}


def fingerprint(out: Path) -> str:
    """SHA-256 of the final weights."""
    return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
