"""``smoothkd evaluate`` as a user types it: what it is told by relative names means the same from everywhere."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import services.datasets
from services.cli.main import app
from services.cli.sweep_views import with_absolute_paths
from services.contract.errors import DatasetError, InvalidInputError
from services.contract.spec_reading import parse_sweep
from services.evaluation.judged import judged_by


def test_judges_named_from_here_are_those_of_a_sweep(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMOOTHKD_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("SMOOTHKD_OFFLINE", "true")
    articles = Path(services.datasets.__path__[0]) / "data" / "demo_news.jsonl"
    Path("news.jsonl").write_text("".join(articles.read_text(encoding="utf-8").splitlines(keepends=True)[:2]))
    Path("lens.json").write_text("{}")
    # Nothing in them: who judges is noted even where the judge then cannot be had.
    for judge in ("hhem", "nli", "encoder"):
        Path(judge).mkdir()
    metrics = ["factual_rate", "factual_consistency", "entailment", "bertscore"]
    judges = {"lens": "lens.json", "hhem": "hhem", "nli": "nli", "encoder": "encoder"}
    command = ["evaluate", "--model", str(tiny_model), "--benchmarks", "demo_news=news.jsonl", "--out", "out"]
    command += ["--max-new-tokens", "3", "--metrics", ",".join(metrics), "--idf"]
    done = CliRunner().invoke(app, [*command, *(part for role, name in judges.items() for part in (f"--{role}", name))])
    assert done.exit_code == 0, done.output
    noted = json.loads(Path("out", "evaluated.json").read_text(encoding="utf-8"))["judged_by"]
    sweep = parse_sweep(
        {
            "name": "judged",
            "student": {"model": str(tiny_model)},
            "dataset": {"path": "demo_instructions"},
            "evaluation": {
                "benchmarks": [{"name": "demo_news", "path": str(tmp_path / "news.jsonl")}],
                "metrics": metrics,
                "judges": {"idf": True} | {role: str(tmp_path / name) for role, name in judges.items()},
            },
        }
    )
    references = [json.loads(line)["highlights"] for line in Path("news.jsonl").read_text().splitlines()]
    evaluation = with_absolute_paths(sweep, tmp_path / "sweep.yaml").evaluation
    expected = judged_by("demo_news", evaluation, references=lambda: references, architecture={})
    assert noted == {f"{metric} of demo_news": judge for metric, judge in expected.items()}
    assert noted["factual_consistency of demo_news"] == str(tmp_path / "hhem")
    assert noted["bertscore of demo_news"].startswith(f"{tmp_path / 'encoder'} with idf over 2 references (")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--hhem", "judge"], "--hhem only serves the metric factual_consistency"),
        (["--lens", "lens.json", "--metrics", "rouge_l"], "--lens only serves the metric factual_rate"),
        (["--nli", "judge"], "--nli only serves the metric entailment"),
        (["--encoder", "judge"], "--encoder only serves the metric bertscore"),
    ],
)
def test_a_judge_that_no_metric_asks_for_is_refused(options: list[str], said: str, tmp_path: Path) -> None:
    command = ["evaluate", "--model", str(tmp_path / "no"), "--benchmarks", "demo_news", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, *options])
    assert isinstance(done.exception, InvalidInputError)
    assert said in done.exception.what


@pytest.mark.parametrize(
    ("benchmark", "line", "why"),
    [
        ("xsum", {"document": "A ferry left."}, "no column 'summary'"),
        (
            "arc_easy",
            {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": ""},
            "none of",
        ),
        ("hotpotqa", {"id": "1", "question": "Why?", "answer": "So.", "context": []}, "nothing usable under context"),
    ],
)
def test_a_file_is_read_before_the_model_and_before_other_benchmarks(
    benchmark: str, line: dict, why: str, tmp_path: Path
) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text(json.dumps(line) + "\n")
    command = ["evaluate", "--model", str(tmp_path / "no"), "--benchmarks", f"demo_news,{benchmark}={file}"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, DatasetError)
    assert f"{file}, line 1: " in done.exception.what
    assert why in done.exception.what
    assert not (tmp_path / "out").exists()
