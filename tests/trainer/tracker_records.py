"""What trackers know of runs, read through their own files and interfaces."""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run as its tracker knows it. ``points``: (step, name) -> value; ``outcome``: as the tracker calls it."""

    name: str
    alpha: float
    precision: str
    points: dict[tuple[int, str], float]
    outcome: str
    problem: str


def read_wandb(folder: Path) -> list[Record]:
    """The files that ``wandb sync`` would send; parts of a run that was resumed are put together by its id, as the
    server does.
    """
    runs: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        records = _ended_wandb_records(file)
        begun = next(record.run for record in records if record.WhichOneof("record_type") == "run")
        run = runs.setdefault(begun.run_id, {"points": {}, "problem": ""})
        run["name"] = begun.display_name
        run["config"] = {item.key: json.loads(item.value_json) for item in begun.config.update}
        for record in records:
            values = {_wandb_key(item): json.loads(item.value_json) for item in record.history.item}
            run["points"] |= {(values["step"], name): value for name, value in values.items()}
            for item in record.summary.update:
                if _wandb_key(item) == "problem":
                    run["problem"] = json.loads(item.value_json)
            if record.WhichOneof("record_type") == "preempting":
                run["preempting"] = True
            if record.WhichOneof("record_type") == "exit":
                ended = "finished" if record.exit.exit_code == 0 else "failed"
                run["outcome"] = "preempted" if run.pop("preempting", False) else ended
    return [
        Record(
            name=run["name"],
            alpha=run["config"]["alpha"],
            precision=run["config"]["training"]["precision"],
            points=run["points"],
            outcome=run["outcome"],
            problem=run["problem"],
        )
        for run in runs.values()
    ]


def _ended_wandb_records(file: Path) -> list[Any]:
    """Its writer is a process of its own, which may be a moment behind."""
    deadline = time.monotonic() + 20
    while True:
        records = list(_wandb_records(file))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < deadline, f"{file} does not end"
        time.sleep(0.05)


def _wandb_key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def _wandb_records(file: Path) -> Iterator[Any]:
    """Its transaction log: LevelDB's log format behind seven bytes of its own, a Record in each entry."""
    from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

    data, at, entry = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left_of_block = 32768 - at % 32768
        if left_of_block < 7:
            at += left_of_block
            continue
        _checksum, length, kind = struct.unpack("<IHB", data[at : at + 7])
        entry += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield WandbRecord.FromString(entry)
            entry = b""


def read_mlflow(folder: Path) -> list[Record]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    found = []
    for experiment in client.search_experiments(filter_string="name = 'smoothkd'"):
        for run in client.search_runs([experiment.experiment_id], order_by=["attribute.start_time"]):
            history = [client.get_metric_history(run.info.run_id, name) for name in run.data.metrics]
            found.append(
                Record(
                    name=run.info.run_name,
                    alpha=float(run.data.params["alpha"]),
                    precision=run.data.params["training.precision"],
                    points={(metric.step, metric.key): metric.value for metrics in history for metric in metrics},
                    outcome=run.info.status,
                    problem=run.data.tags.get("problem", ""),
                )
            )
    return found


def read_trackio(folder: Path) -> list[Record]:
    """Of the project that is called as the folder is."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    found = []
    for run in trackio.Api().runs(folder.name):
        alerts = run.alerts()
        found.append(
            Record(
                name=run.name,
                alpha=run.config["alpha"],
                precision=run.config["training"]["precision"],
                points={
                    (logged["step"], name): value
                    for logged in SQLiteStorage.get_logs(folder.name, run.name)
                    for name, value in logged.items()
                    if name not in ("step", "timestamp")
                },
                outcome=alerts[0]["title"] if alerts else "",
                problem=alerts[0]["text"] if alerts else "",
            )
        )
    return found
