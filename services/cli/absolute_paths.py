"""Names of files and directories that mean the same from everywhere."""

from collections.abc import Collection, Sequence
from pathlib import Path

from services.contract.evaluation_spec import EvaluationSpec
from services.datasets.reading import SHIPPED as DATA_SETS
from services.evaluation.lookback.shipped import SHIPPED as LENSES


def absolute_evaluation(spec: EvaluationSpec, *, places: Sequence[Path] = (Path(),)) -> EvaluationSpec:
    """With the files of its benchmarks and its judges named absolutely, so that equal names are equal judges."""
    data = spec.model_dump()
    for benchmark in data["benchmarks"]:
        if benchmark["path"]:
            benchmark["path"] = absolute_name(benchmark["path"], places=places, shipped=DATA_SETS)
    for judge, name in data["judges"].items():
        if name and isinstance(name, str):
            shipped = LENSES if judge == "lens" else ()
            data["judges"][judge] = absolute_name(name, places=places, shipped=shipped)
    return EvaluationSpec.model_validate(data)


def absolute_name(name: str, *, places: Sequence[Path], shipped: Collection[str] = ()) -> str:
    """The absolute path where ``name`` exists in one of ``places``, the first first; else the name, as of the hub.

    What is called like something ``shipped`` is that, as wherever it is read: another file is named by its path.
    """
    if name in shipped:
        return name
    for place in places:
        candidate = place / name
        if candidate.exists():
            return str(candidate.absolute())
    return name
