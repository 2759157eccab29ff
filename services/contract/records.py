"""What the platform knows about sweeps and runs: the bodies of API answers and the rows that stages write."""

from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from services.contract.spec import RunSpec, SweepSpec
from services.contract.states import StageKind, State


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Problem(Record):
    """Why something failed: RFC 9457 problem details, also kept with a failed stage."""

    reason: str
    what: str
    fix: str = ""


class StageRecord(Record):
    """One step of a run. A stage that several runs of a sweep share has no ``run_id``."""

    id: str
    sweep_id: str
    run_id: str | None
    kind: StageKind
    state: State
    attempt: int = Field(description="Fencing number of the newest attempt; 0 before the first.")
    worker: str | None = None
    problem: Problem | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None


class RunRecord(Record):
    id: str
    sweep_id: str
    method: str
    spec: RunSpec
    state: State
    cancel_requested: bool
    stages: list[StageRecord]
    progress: float = Field(description="Share of the run's work that is done, 0 to 1.")
    problem: Problem | None = None


class SweepRecord(Record):
    id: str
    name: str
    spec: SweepSpec
    state: State
    cancel_requested: bool
    created_at: datetime
    runs: dict[State, int] = Field(description="Number of runs per state.")


class MetricPoint(Record):
    """One value of one metric: ``loss``, ``hard_loss``, ``soft_loss``, ``learning_rate``, ``tokens_per_second`` ..."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    step: Annotated[int, Field(ge=0)]
    value: float


class Span(Record):
    """Characters [start, end) of an output that a detector holds to be unsupported by the source."""

    start: Annotated[int, Field(ge=0)]
    end: Annotated[int, Field(gt=0)]
    detector: str
    kind: str = Field(description="What the span is: number, entity, word.")
    score: Annotated[float, Field(ge=0, le=1)] = Field(description="1 is certainly unsupported.")
    explanation: str


class Generation(Record):
    """One benchmark item answered by one student."""

    benchmark: str
    item_id: str
    source: str
    reference: str
    output: str
    scores: dict[str, float] = Field(description="Per-item metrics, by name.")
    spans: list[Span]


class Score(Record):
    """One metric of one benchmark for one run; ``value`` is None with a ``missing`` reason when it cannot be had."""

    benchmark: str
    metric: str
    value: float | None
    missing: str | None = None
    items: int = Field(description="Items the value is a mean over.")
    higher_is_better: bool = True
    judged_by: str | None = Field(
        default=None, description="What the value depends on beside the outputs: equal words, comparable values."
    )


class Artifact(Record):
    """A file or directory a stage left under the data directory."""

    run_id: str
    name: str
    path: str = Field(description="Relative to the data directory.")


class SummaryCell(Record):
    """Mean and sample standard deviation over learning rate x batch size x seed of one method."""

    benchmark: str
    metric: str
    mean: float | None
    std: float | None = Field(description="None below two runs.")
    runs: int
    missing: str | None = None
    best: bool = False


class SummaryRow(Record):
    method: str
    alpha: float
    runs: int
    ended: int
    cells: list[SummaryCell]


class Summary(Record):
    """A sweep's result table in the paper's form: one row per method, SFT first, then by alpha."""

    sweep_id: str
    state: State
    rows: list[SummaryRow]


class CaseOutput(Record):
    run_id: str
    method: str
    output: str
    scores: dict[str, float]
    spans: list[Span]


class CaseStudy(Record):
    """The same item answered by an SFT student and KD students, widest difference first."""

    benchmark: str
    item_id: str
    source: str
    reference: str
    outputs: list[CaseOutput]
    metric: str = Field(default="unsupported_words", description="What the difference is of.")
    difference: float = Field(
        description="How much better than SFT's the KD output is that differs most from it, in hundredths of the "
        "metric's 100 points; negative where it is worse."
    )


class RunStatus(Record):
    """A run in brief, as events tell it."""

    id: str
    method: str
    state: State
    cancel_requested: bool
    progress: float = Field(description="Share of the run's work that is done, 0 to 1.")
    problem: Problem | None = None


class SweepEvent(Record):
    """Where a sweep stands: one server-sent event of ``GET /v1/sweeps/{id}/events``.

    ``changed`` holds every run in a connection's first event and the runs that changed since in the later ones.
    """

    sweep_id: str
    state: State
    cancel_requested: bool
    runs: dict[State, int] = Field(description="Number of runs per state.")
    changed: list[RunStatus]


class PlannedRun(Record):
    """One point of a sweep's grid before anything is stored."""

    key: str = Field(description="Depends on the run's content alone.")
    method: str
    alpha: float
    learning_rate: float
    batch_size: int
    seed: int


class SweepPlan(Record):
    """What a sweep would run: the answer to a specification that was checked and not stored."""

    name: str
    runs: list[PlannedRun]


class Readiness(Record):
    """Whether the API can take work; each part says ``ok``."""

    ready: bool
    store: str
    queue: str


class MetricList(Record):
    items: list[MetricPoint]


class ScoreList(Record):
    items: list[Score]


class ArtifactList(Record):
    items: list[Artifact]


class SweepPage(Record):
    """``next_cursor`` asks for what follows; None at the end."""

    items: list[SweepRecord]
    next_cursor: str | None = None


class RunPage(Record):
    items: list[RunRecord]
    next_cursor: str | None = None


class GenerationPage(Record):
    items: list[Generation]
    next_cursor: str | None = None


class CaseStudyPage(Record):
    items: list[CaseStudy]
    next_cursor: str | None = None
