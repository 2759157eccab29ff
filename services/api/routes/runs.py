"""Runs and what they left behind: metrics, generations, scores, artifacts."""

from typing import Annotated

from fastapi import APIRouter, Query

from services.api.dependencies import Cursor, Limit, StoreHere
from services.contract.records import ArtifactList, GenerationPage, MetricList, RunRecord, ScoreList

router = APIRouter(tags=["runs"])
Names = Annotated[list[str] | None, Query(description="Only these metrics; repeat the parameter for several.")]
AfterStep = Annotated[int, Query(ge=-1, description="Only later steps, for reading on.")]
Benchmark = Annotated[str | None, Query(description="Only this benchmark.")]


@router.get("/runs/{run_id}")
def get_run(run_id: str, store: StoreHere) -> RunRecord:
    """One run with its stages."""
    return store.run(run_id)


@router.get("/runs/{run_id}/metrics")
def list_metrics(run_id: str, store: StoreHere, names: Names = None, after_step: AfterStep = -1) -> MetricList:
    """Training curves, by name, then step."""
    return MetricList(items=store.metrics(run_id, names=names, after_step=after_step))


@router.get("/runs/{run_id}/generations")
def list_generations(
    run_id: str, store: StoreHere, benchmark: Benchmark = None, limit: Limit = 50, cursor: Cursor = None
) -> GenerationPage:
    """The student's answers with their unsupported spans, by benchmark, then item."""
    return store.generations(run_id, benchmark=benchmark, limit=limit, cursor=cursor)


@router.get("/runs/{run_id}/scores")
def list_scores(run_id: str, store: StoreHere) -> ScoreList:
    """The run's value of every benchmark and metric."""
    return ScoreList(items=store.scores(run_id))


@router.get("/runs/{run_id}/artifacts")
def list_artifacts(run_id: str, store: StoreHere) -> ArtifactList:
    """Files and directories that the run left under the data directory."""
    return ArtifactList(items=store.artifacts(run_id))
