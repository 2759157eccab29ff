"""A world of sweeps that looks like a real one: three methods, two seeds, articles, invented facts, failures."""

import math
import random
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from statistics import fmean, stdev

from services.contract.records import (
    CaseStudy,
    MetricPoint,
    Problem,
    RunRecord,
    StageRecord,
    Summary,
    SummaryCell,
    SummaryRow,
    SweepRecord,
)
from services.contract.spec import SweepSpec, expand
from services.contract.spec_reading import parse_sweep
from services.contract.states import StageKind, State, combined_state
from tests.dashboard.seed_studies import make_studies

START = datetime(2026, 3, 2, 9, 30, tzinfo=UTC)
FAILURE = Problem(
    reason="training",
    what="the loss of step 41 is not finite (nan) with learning rate 0.0003 and fp16",
    fix="Lower grid.learning_rate, or set training.precision to bf16 or fp32.",
)


@dataclass
class World:
    """What the fake API serves; tests change it as a worker would."""

    sweeps: dict[str, SweepRecord] = field(default_factory=dict)
    runs: dict[str, list[RunRecord]] = field(default_factory=dict)
    metrics: dict[str, list[MetricPoint]] = field(default_factory=dict)
    summaries: dict[str, Summary] = field(default_factory=dict)
    studies: dict[str, list[CaseStudy]] = field(default_factory=dict)

    def add(self, sweep_id: str, spec: SweepSpec, states: list[State], *, age: timedelta) -> list[RunRecord]:
        created = START - age
        self.runs[sweep_id] = [
            make_run(sweep_id, spec, index, state, created=created) for index, state in enumerate(states)
        ]
        self.sweeps[sweep_id] = SweepRecord(
            id=sweep_id,
            name=spec.name,
            spec=spec,
            state=State.QUEUED,
            cancel_requested=False,
            created_at=created,
            runs={},
        )
        self.count(sweep_id)
        return self.runs[sweep_id]

    def count(self, sweep_id: str) -> None:
        """Brings the sweep's record in line with its runs."""
        states = [run.state for run in self.runs[sweep_id]]
        self.sweeps[sweep_id] = self.sweeps[sweep_id].model_copy(
            update={"state": combined_state(states), "runs": {state: states.count(state) for state in set(states)}}
        )

    def set_run(self, sweep_id: str, index: int, state: State, *, progress: float = 1.0) -> None:
        run = self.runs[sweep_id][index]
        fresh = make_run(sweep_id, self.sweeps[sweep_id].spec, index, state, created=START, progress=progress)
        self.runs[sweep_id][index] = fresh.model_copy(update={"id": run.id})
        self.count(sweep_id)


def populated() -> World:
    """Three sweeps: one finished with everything, one under way with a failure, one cancelled."""
    world = _populated()
    return World(
        sweeps=dict(world.sweeps),
        runs={sweep_id: list(runs) for sweep_id, runs in world.runs.items()},
        metrics=dict(world.metrics),
        summaries=dict(world.summaries),
        studies={sweep_id: list(studies) for sweep_id, studies in world.studies.items()},
    )


@cache
def _populated() -> World:
    world = World()
    done = make_spec("news-alpha", alpha=[0, 0.1, 1.0], seed=[0, 1])
    finished = world.add("sw-0003-finished", done, [State.SUCCEEDED] * 6, age=timedelta(hours=3))
    for run in finished:
        world.metrics[run.id] = make_metrics(run, steps=240)
    world.summaries["sw-0003-finished"] = make_summary("sw-0003-finished", finished, world.sweeps)
    world.studies["sw-0003-finished"] = make_studies(finished)

    live = make_spec("learning-rates", alpha=[0, 1.0], learning_rate=[1e-5, 3e-4])
    states = [State.SUCCEEDED, State.FAILED, State.RUNNING, State.QUEUED]
    running = world.add("sw-0004-running", live, states, age=timedelta(minutes=12))
    for run, steps in zip(running, (240, 41, 90, 0), strict=True):
        world.metrics[run.id] = make_metrics(run, steps=steps)
    world.summaries["sw-0004-running"] = make_summary("sw-0004-running", running, world.sweeps)
    world.studies["sw-0004-running"] = []

    stopped = make_spec("stopped-early", alpha=[0, 10.0])
    world.add("sw-0002-cancelled", stopped, [State.CANCELLED, State.CANCELLED], age=timedelta(days=2))
    world.summaries["sw-0002-cancelled"] = Summary(sweep_id="sw-0002-cancelled", state=State.CANCELLED, rows=[])
    world.studies["sw-0002-cancelled"] = []
    return world


def paper_sized(*, steps: int = 1500) -> World:
    """The paper's grid: 5 alphas x 2 learning rates x 3 batch sizes, on six benchmarks."""
    world = World()
    benchmarks = ["cnn_dailymail", "xsum", "arc_challenge", "arc_easy", "hellaswag", "openbookqa"]
    spec = make_spec(
        "qwen2.5-7b",
        alpha=[0, 0.01, 0.1, 1.0, 10.0],
        learning_rate=[1e-5, 5e-6],
        batch_size=[2, 4, 8],
        benchmarks=benchmarks,
    )
    runs = world.add("sw-0009-paper", spec, [State.SUCCEEDED] * 30, age=timedelta(hours=30))
    for run in runs:
        world.metrics[run.id] = make_metrics(run, steps=steps)
    world.summaries["sw-0009-paper"] = make_summary("sw-0009-paper", runs, world.sweeps)
    world.studies["sw-0009-paper"] = make_studies(runs)
    return world


def make_spec(name: str, *, benchmarks: list[str] | None = None, **grid: list[float]) -> SweepSpec:
    return parse_sweep(
        {
            "name": name,
            "teacher": {"model": "HuggingFaceTB/SmolLM2-1.7B-Instruct"},
            "student": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct"},
            "dataset": {"path": "demo_instructions"},
            "grid": grid,
            "evaluation": {"benchmarks": benchmarks or ["demo_news", "xsum"]},
        }
    )


def make_run(
    sweep_id: str, spec: SweepSpec, index: int, state: State, *, created: datetime, progress: float | None = None
) -> RunRecord:
    run_spec = expand(spec)[index]
    run_id = f"{sweep_id}-{run_spec.key[:8]}"
    train, evaluate = {
        State.SUCCEEDED: (State.SUCCEEDED, State.SUCCEEDED),
        State.FAILED: (State.FAILED, State.SKIPPED),
        State.RUNNING: (State.RUNNING, State.QUEUED),
        State.CANCELLED: (State.CANCELLED, State.CANCELLED),
    }.get(state, (state, state))
    began = created + timedelta(minutes=3 * index)

    def stage(kind: StageKind, stage_state: State, start: datetime) -> StageRecord:
        started = stage_state in (State.SUCCEEDED, State.FAILED, State.RUNNING)
        failed = stage_state is State.FAILED
        return StageRecord(
            id=f"{run_id}-{kind}",
            sweep_id=sweep_id,
            run_id=run_id,
            kind=kind,
            state=stage_state,
            attempt=(2 if failed else 1) if started else 0,
            worker="gpu-node-1:4711" if started else None,
            problem=FAILURE if failed else None,
            started_at=start if started else None,
            ended_at=start + timedelta(seconds=140) if started and stage_state is not State.RUNNING else None,
        )

    done = {State.SUCCEEDED: 1.0, State.RUNNING: 0.42, State.FAILED: 0.17}.get(state, 0.0)
    return RunRecord(
        id=run_id,
        sweep_id=sweep_id,
        method=run_spec.method,
        spec=run_spec,
        state=state,
        cancel_requested=False,
        stages=[
            stage(StageKind.TRAIN, train, began),
            stage(StageKind.EVALUATE, evaluate, began + timedelta(seconds=141)),
        ],
        progress=done if progress is None else progress,
        problem=FAILURE if state is State.FAILED else None,
    )


def make_metrics(run: RunRecord, *, steps: int) -> list[MetricPoint]:
    noise = random.Random(run.id)
    points = []
    for step in range(1, steps + 1):
        hard = 1.4 + 1.9 * math.exp(-step / 60) + noise.gauss(0, 0.09)
        soft = 1.1 + 1.5 * math.exp(-step / 80) + noise.gauss(0, 0.05)
        values = {
            "hard_loss": hard,
            "soft_loss": soft if run.spec.alpha else 0.0,
            "loss": hard + run.spec.alpha * soft,
            "learning_rate": run.spec.learning_rate * (1 + math.cos(math.pi * step / 240)) / 2,
            "tokens_per_second": 2900 - 400 * bool(run.spec.alpha) + noise.gauss(0, 60),
            "grad_norm": 0.8 + abs(noise.gauss(0, 0.3)),
            "label_wait_seconds": abs(noise.gauss(0, 0.01)) if run.spec.alpha else 0.0,
            "epoch": step / 240,
        }
        points += [MetricPoint(name=name, step=step, value=value) for name, value in values.items()]
    return points


def make_summary(sweep_id: str, runs: list[RunRecord], sweeps: dict[str, SweepRecord]) -> Summary:
    sweep = sweeps[sweep_id]
    methods = list(dict.fromkeys(run.method for run in runs))
    columns = []
    for benchmark in (item.name for item in sweep.spec.evaluation.benchmarks):
        summarising = benchmark in ("demo_news", "cnn_dailymail", "xsum")
        columns += [(benchmark, metric) for metric in (("rouge_l", "support") if summarising else ("acc_norm",))]
    cells: dict[str, list[SummaryCell]] = {method: [] for method in methods}
    for benchmark, metric in columns:
        means = {}
        for method in methods:
            noise = random.Random(f"{benchmark}{metric}{method}")
            ended = [run for run in runs if run.method == method and run.state is State.SUCCEEDED]
            base = {"rouge_l": 24.0, "support": 81.0}.get(metric, 47.0) + 1.7 * methods.index(method)
            values = [base + noise.gauss(0, 1.1) for _ in ended]
            missing = "no run of this method has been evaluated"
            if benchmark == "xsum" and method == "KD alpha=0.1" and metric == "support":
                values, missing = [], "the detector's model is not installed; run pip install 'smoothkd[worker]'"
            means[method] = (values, missing)
        reached = [fmean(values) for values, _ in means.values() if values]
        best = max(reached) if len(reached) > 1 else None
        for method, (values, missing) in means.items():
            cells[method].append(
                SummaryCell(
                    benchmark=benchmark,
                    metric=metric,
                    mean=fmean(values) if values else None,
                    std=stdev(values) if len(values) > 1 else None,
                    runs=len(values),
                    missing=None if values else missing,
                    best=bool(values) and fmean(values) == best,
                )
            )
    rows = [
        SummaryRow(
            method=method,
            alpha=next(run.spec.alpha for run in runs if run.method == method),
            runs=sum(run.method == method for run in runs),
            ended=sum(run.method == method and run.state is State.SUCCEEDED for run in runs),
            cells=cells[method],
        )
        for method in methods
    ]
    return Summary(sweep_id=sweep_id, state=sweep.state, rows=rows)
