"""Judges are told apart by what they are: equal words for one judge, whatever it is called, and only for one."""

import json
import shutil
from pathlib import Path

import pytest

from services.contract.evaluation_spec import EvaluationSpec
from services.datasets.reading import load_items
from services.evaluation.judged import judged_by
from services.evaluation.lookback.lens import load_lens
from services.evaluation.lookback.shipped import SHIPPED

NAME = "smollm2-135m-instruct"
LENS = load_lens(NAME)


def words(metric: str, *, architecture: dict | None = None, limit: int | None = None, path: Path | None = None, **how):
    benchmark = {"name": "demo_news", "path": str(path) if path else None}
    samples = how.pop("samples", 0)
    spec = EvaluationSpec.model_validate(
        {"benchmarks": [benchmark], "metrics": [metric], "judges": how, "limit": limit, "samples": samples}
    )

    def references() -> list[str]:
        return [item.reference for item in load_items(spec.benchmarks[0], limit=limit)]

    found = judged_by(
        "demo_news", spec, references=references, architecture=architecture or LENS.fingerprint.architecture
    )
    return found.get(metric)


def test_a_lens_is_one_judge_by_every_name(tmp_path: Path) -> None:
    copied = tmp_path / "copied.json"
    content = json.loads(SHIPPED[NAME].read_text())
    copied.write_text(json.dumps(content | {"training": {"told": "otherwise"}}))
    names = {words("factual_rate", lens=name) for name in (None, NAME, str(copied))}
    assert names == {f"the lens of {LENS.model} ({LENS.digest[:8]})"}


@pytest.mark.parametrize("change", [{"intercept": 0.25}, {"threshold": 0.75}, {"instruction": "Say it again."}])
def test_a_lens_that_judges_otherwise_is_another(change: dict, tmp_path: Path) -> None:
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(json.loads(SHIPPED[NAME].read_text()) | change))
    assert words("factual_rate", lens=str(changed)) != words("factual_rate", lens=NAME)


def test_without_a_lens_that_fits_or_can_be_read_nobody_is_taken_for_the_judge() -> None:
    assert words("factual_rate", architecture={"model_type": "bart"}) == "no lens that fits"
    assert words("factual_rate", lens="none.json") == "the lens none.json"


def test_words_weighed_by_the_same_references_are_one_judge(tmp_path: Path) -> None:
    whole = words("bertscore", idf=True)
    assert words("bertscore", idf=True, limit=10_000) == whole
    assert words("bertscore", idf=True, limit=3) != whole
    shipped = Path(load_items.__code__.co_filename).parent / "data" / "demo_news.jsonl"
    copied = tmp_path / "news.jsonl"
    shutil.copy(shipped, copied)
    assert words("bertscore", idf=True, path=copied) == whole
    first, *rest = copied.read_text(encoding="utf-8").splitlines(keepends=True)
    row = json.loads(first)
    copied.write_text(json.dumps(row | {"highlights": row["highlights"] + " Again."}) + "\n" + "".join(rest))
    assert words("bertscore", idf=True, path=copied) != whole
    assert words("bertscore") == "all-minilm-l6-v2"
    assert words("bertscore", encoder="another") == "another"


def test_what_no_model_judges_has_no_judge() -> None:
    assert words("rouge_l") is None
    assert words("support") is None
    spec = EvaluationSpec.model_validate({"benchmarks": ["hotpotqa"], "metrics": ["factual_rate"]})
    assert judged_by("hotpotqa", spec, references=list, architecture={}) == {}


def test_samples_are_judged_by_as_many_and_by_whom() -> None:
    assert words("self_consistency", samples=3) != words("self_consistency", samples=4)
    assert words("consistency") in words("self_consistency", samples=3)
