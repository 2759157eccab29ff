"""What a report says of a sweep: its table, each method against SFT item by item, failures, and the trade-off."""

from datetime import datetime

from pydantic import Field

from services.contract.records import Problem, Record, Summary
from services.contract.states import State


class Comparison(Record):
    """A method against SFT on the same items, over runs of equal learning rate, batch size and seed.

    ``difference`` is the mean over items of (method - SFT), in the metric's own points; [``low``, ``high``] holds 95 %
    of its bootstrap resamples of items. ``p_adjusted`` bounds the chance of any false finding among all comparisons
    of the report (Holm, 1979).
    """

    method: str
    benchmark: str
    metric: str
    difference: float | None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    p_adjusted: float | None = None
    better: bool | None = Field(default=None, description="None where p_adjusted leaves it open.")
    items: int = Field(description="Items that both sides answered and that have a value on both.")
    left_out: int = Field(description="Items with a value on one side only.")
    pairs: int = Field(description="Pairs of runs.")
    missing: str | None = None


class MethodRuns(Record):
    """How many runs of a method stand in which state."""

    method: str
    states: dict[State, int]


class RunFailure(Record):
    """A run that did not succeed, and why."""

    run_id: str
    method: str
    setting: str
    state: State
    problem: Problem | None


class TradeOffPoint(Record):
    """``on_front``: no other method is at least as good in both and better in one."""

    method: str
    quality: float
    faithfulness: float
    on_front: bool


class TradeOff(Record):
    """Faithfulness against general quality, each a mean over the benchmarks that have the metric."""

    faithfulness: str = Field(description="The metric.")
    quality: str
    faithfulness_benchmarks: list[str]
    quality_benchmarks: list[str]
    points: list[TradeOffPoint]
    left_out: list[str] = Field(description="Methods without a place, and why.")


class Report(Record):
    """A sweep's results in the paper's form, with the uncertainty of every difference."""

    sweep_id: str
    name: str
    state: State
    created_at: datetime
    student: str
    teacher: str | None
    dataset: str
    summary: Summary
    directions: dict[str, bool] = Field(description="Whether higher is better, by metric.")
    comparisons: list[Comparison]
    runs: list[MethodRuns]
    failures: list[RunFailure]
    trade_offs: list[TradeOff]
    resamples: int
