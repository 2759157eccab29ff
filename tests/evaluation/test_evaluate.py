"""A whole evaluation: scores by benchmark, failures that stay where they are, and nothing done twice."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import sacrebleu

from services.contract.errors import CancelledError, ConflictError, EvaluationError, InvalidInputError, SmoothKDError
from services.contract.evaluation_spec import EvaluationSpec, JudgeSpec
from services.contract.records import Generation, Score
from services.contract.settings import Settings
from services.evaluation import answering
from services.evaluation.consistency.detector import detect_consistency
from services.evaluation.directory import evaluate_to_directory
from services.evaluation.evaluate import evaluate
from services.evaluation.rouge import rouge_l
from services.evaluation.support import check_support
from tests.evaluation.tiny_judges import make_encoder

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", offline=True)


def test_scores_are_means_over_the_generations(tiny_model: Path, settings: Settings) -> None:
    generations: list[Generation] = []
    progress: list[float] = []
    scores = evaluate(
        str(tiny_model),
        spec=_spec("demo_news", limit=5),
        settings=settings,
        on_generations=generations.extend,
        on_progress=progress.append,
    )
    assert len({generation.item_id for generation in generations}) == 5
    assert progress == [0.4, 0.8, 1.0, 1.0]
    rouge = [rouge_l(generation.output, reference=generation.reference) for generation in generations]
    support = [check_support(generation.output, source=generation.source).share for generation in generations]
    shares = [share for share in support if share is not None]
    assert [score.metric for score in scores] == ["rouge_l", "support", "consistency", "factual_rate"]
    assert scores[:2] == [
        Score(benchmark="demo_news", metric="rouge_l", value=sum(rouge) / 5, items=5),
        Score(benchmark="demo_news", metric="support", value=sum(shares) / len(shares), items=len(shares)),
    ]
    for generation in generations:
        expected = check_support(generation.output, source=generation.source)
        assert [span for span in generation.spans if span.detector == "support"] == expected.spans
        assert generation.scores.get("support") == expected.share
    consistency, factual_rate = scores[2:]
    detections = detect_consistency([(generation.source, generation.output) for generation in generations])
    judged = [100 * (1 - detection.score) for detection in detections if detection.score is not None]
    assert consistency.items == len(judged) > 0
    assert consistency.value == pytest.approx(sum(judged) / len(judged), abs=0.1)
    assert (factual_rate.value, factual_rate.items) == (None, 0)
    assert "no lens was trained on this model" in str(factual_rate.missing)


def test_one_failing_benchmark_leaves_the_others(tiny_model: Path, settings: Settings, tmp_path: Path) -> None:
    broken = tmp_path / "xsum.jsonl"
    broken.write_text('{"document": "No summary here.", "id": "1"}\n')
    spec = EvaluationSpec.model_validate(
        {"benchmarks": [{"name": "xsum", "path": str(broken)}, "demo_news"], "limit": 2, "max_new_tokens": 4}
    )
    scores = evaluate(str(tiny_model), spec=spec, settings=settings)
    assert [(score.benchmark, score.metric, score.items) for score in scores[:5:2]] == [
        ("xsum", "rouge_l", 0),
        ("xsum", "consistency", 0),
        ("demo_news", "rouge_l", 2),
    ]
    assert scores[0].value is None
    assert "no column 'summary'" in str(scores[0].missing)


def test_an_unforeseen_failure_keeps_its_traceback(
    tiny_model: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> list[str]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(answering, "_generate", fail)
    with caplog.at_level(logging.WARNING), pytest.raises(EvaluationError, match="demo_news: RuntimeError: out of mem"):
        evaluate(str(tiny_model), spec=_spec("demo_news"), settings=settings)
    assert "Traceback" in caplog.text


def test_when_every_benchmark_fails_the_evaluation_fails(tiny_model: Path, settings: Settings, tmp_path: Path) -> None:
    absent = [{"name": name, "path": str(tmp_path / "absent.jsonl")} for name in ("xsum", "arc_easy")]
    with pytest.raises(EvaluationError, match=r"xsum: there is no file .*; arc_easy: there is no file"):
        evaluate(str(tiny_model), spec=EvaluationSpec.model_validate({"benchmarks": absent}), settings=settings)


@pytest.mark.parametrize("error", [CancelledError("stopped"), OSError("the disk is full")])
def test_errors_of_the_caller_are_the_callers(error: Exception, tiny_model: Path, settings: Settings) -> None:
    def keep(_: Sequence[Generation]) -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        evaluate(str(tiny_model), spec=_spec("demo_news"), settings=settings, on_generations=keep)


def test_known_items_are_not_generated_again(tiny_model: Path, settings: Settings) -> None:
    first: list[Generation] = []
    scores = evaluate(str(tiny_model), spec=_spec("demo_news", limit=4), settings=settings, on_generations=first.extend)
    again: list[Generation] = []
    changed = first[1].model_copy(update={"source": "Another article."})
    repeated = evaluate(
        str(tiny_model),
        spec=_spec("demo_news", limit=4),
        settings=settings,
        known=[first[0], changed, first[3]],
        on_generations=again.extend,
    )
    assert {generation.item_id for generation in again} == {first[1].item_id, first[2].item_id}
    # The consistency network reads outputs in batches, whose make-up moves its last digits.
    assert [score.value for score in repeated] == pytest.approx([score.value for score in scores], abs=0.1)
    assert [score.model_copy(update={"value": None}) for score in repeated] == [
        score.model_copy(update={"value": None}) for score in scores
    ]


def test_a_directory_gets_generations_and_scores(tiny_model: Path, settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    scores = evaluate_to_directory(str(tiny_model), _spec("demo_news", limit=3), out, settings)
    lines = (out / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    generations = [Generation.model_validate_json(line) for line in lines]
    assert [generation.item_id for generation in generations] == ["demo-news-01", "demo-news-02", "demo-news-03"]
    assert [Score.model_validate(score) for score in json.loads((out / "scores.json").read_text())] == scores
    assert {file.name for file in out.iterdir()} == {"generations.jsonl", "scores.json", "evaluated.json"}


@pytest.mark.slow
def test_an_interrupted_evaluation_is_carried_on(
    tiny_model: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its fourth batch, with its last line cut short; then only the rest is generated."""
    out = tmp_path / "out"
    program = """
        import signal, sys
        from pathlib import Path
        from services.contract.settings import Settings
        from services.contract.evaluation_spec import EvaluationSpec
        from services.evaluation import answering
        from services.evaluation.directory import evaluate_to_directory
        plain, batches = answering._generate, []
        def three_batches(*some, **rest):
            batches.append(some)
            if len(batches) > 3:
                signal.pause()
            return plain(*some, **rest)
        answering._generate = three_batches
        spec = EvaluationSpec.model_validate_json(sys.argv[2])
        evaluate_to_directory(sys.argv[1], spec, Path(sys.argv[3]), Settings())
    """
    spec = EvaluationSpec.model_validate({"benchmarks": ["demo_news"], "max_new_tokens": 20, "batch_size": 1})
    argv = [sys.executable, "-c", textwrap.dedent(program), str(tiny_model), spec.model_dump_json(), str(out)]
    environment = {
        **os.environ,
        "SMOOTHKD_DATA_DIR": str(tmp_path),
        "SMOOTHKD_OFFLINE": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    process = subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = out / "generations.jsonl"
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_bytes().count(b"\n") == 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = file.read_bytes()
    file.write_bytes(before[:-1])

    generated: list[list[int]] = []
    plain = answering._generate
    monkeypatch.setattr(
        answering, "_generate", lambda prompts, **rest: generated.extend(prompts) or plain(prompts, **rest)
    )
    scores = evaluate_to_directory(str(tiny_model), spec, out, settings)
    assert len(generated) == 24 - 2
    assert scores[0].items == 24
    assert len(set(file.read_text(encoding="utf-8").splitlines())) == 24
    assert scores == evaluate(str(tiny_model), spec=spec, settings=settings)


def test_a_directory_of_another_model_is_refused(tiny_model: Path, settings: Settings, tmp_path: Path) -> None:
    from services.models.tiny import make_tiny_model

    out = tmp_path / "out"
    model = make_tiny_model(tmp_path / "model", seed=1)
    evaluate_to_directory(str(model), _spec("demo_news", limit=1), out, settings)
    with pytest.raises(ConflictError, match="holds an evaluation of"):
        evaluate_to_directory(str(tiny_model), _spec("demo_news", limit=1), out, settings)
    longer = _spec("demo_news", limit=1).model_copy(update={"max_new_tokens": 7})
    with pytest.raises(ConflictError, match="with up to 6 tokens"):
        evaluate_to_directory(str(model), longer, out, settings)
    judged = longer.model_copy(update={"max_new_tokens": 6, "judges": JudgeSpec(lens="another")})
    with pytest.raises(ConflictError, match="of demo_news by no lens that fits, not by the lens another"):
        evaluate_to_directory(str(model), judged, out, settings)
    make_tiny_model(model, seed=2)
    with pytest.raises(ConflictError, match="or of other weights there"):
        evaluate_to_directory(str(model), _spec("demo_news", limit=1), out, settings)


def test_a_directory_that_cannot_be_read_or_made_is_named(tiny_model: Path, settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate_to_directory(str(tiny_model), _spec("demo_news", limit=1), out, settings)
    unread = ("judged_by", []), ("judged_by", None), ("weights", 3), ("max_new_tokens", "many"), ("answered_by", 1)
    damaged = [json.dumps({"model": "x", "max_new_tokens": 3} | {name: value}) for name, value in unread]
    for text in ("{", "[]", "{}", "null", *damaged):
        (out / "evaluated.json").write_text(text)
        with pytest.raises(InvalidInputError, match=r"evaluated\.json does not say whose outputs"):
            evaluate_to_directory(str(tiny_model), _spec("demo_news", limit=1), out, settings)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InvalidInputError, match="file can be no directory: File exists"):
        evaluate_to_directory(str(tiny_model), _spec("demo_news", limit=1), file, settings)


def test_a_model_of_an_unknown_kind_is_named(tiny_model: Path, settings: Settings, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(SmoothKDError, match="no-such-architecture"):
        evaluate_to_directory(str(tmp_path / "model"), _spec("demo_news", limit=1), tmp_path / "out", settings)


def test_a_directory_holds_one_idf(tiny_model: Path, settings: Settings, tmp_path: Path) -> None:
    out, encoder = tmp_path / "out", str(tmp_path / "encoder")
    make_encoder(Path(encoder))

    def judged(limit: int, *, idf: bool) -> EvaluationSpec:
        judges = JudgeSpec(encoder=encoder, idf=idf)
        return _spec("demo_news", limit=limit).model_copy(update={"metrics": ("bertscore",), "judges": judges})

    evaluate_to_directory(str(tiny_model), judged(2, idf=True), out, settings)
    with pytest.raises(ConflictError, match=r"holds a bertscore of demo_news by .* with idf over 2 ref.*, not by"):
        evaluate_to_directory(str(tiny_model), judged(2, idf=False), out, settings)
    with pytest.raises(ConflictError, match=r"idf over 2 references .*, not by .* with idf over 3 references"):
        evaluate_to_directory(str(tiny_model), judged(3, idf=True), out, settings)
    (score,) = evaluate_to_directory(str(tiny_model), judged(2, idf=True), out, settings)
    assert str(score.judged_by).startswith(f"{encoder} with idf over 2 references (")


def test_a_directory_takes_further_metrics_and_generates_nothing_again(
    tiny_model: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = evaluate_to_directory(str(tiny_model), _spec("demo_news", limit=3), out, settings)
    monkeypatch.setattr(answering, "_generate", lambda *_, **__: pytest.fail("an output was generated again"))
    more = _spec("demo_news", limit=3).model_copy(update={"metrics": ("rouge_l", "chrf")})
    scores = evaluate_to_directory(str(tiny_model), more, out, settings)
    lines = (out / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    generations = [Generation.model_validate_json(line) for line in lines]
    plain = [sacrebleu.sentence_chrf(one.output, [one.reference]).score for one in generations]
    assert scores[0] == first[0]
    assert scores[1].value == pytest.approx(sum(plain) / 3)
    assert all("support" in one.scores for one in generations)


def test_questions_are_answered_and_marked(
    tiny_model: Path, settings: Settings, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = {"name": "hotpotqa", "path": str(shared_data / "hotpot_qa" / "distractor.jsonl")}
    spec = EvaluationSpec.model_validate({"benchmarks": [benchmark], "limit": 4, "max_new_tokens": 6, "batch_size": 4})
    # The first is answered rightly, the second in part, the others not at all.
    outputs = ["Gesellschaft mit beschränkter Haftung.", "The VIVA\nas it says", "", "zebra"]

    def generate(prompts: list[list[int]], **_: object) -> list[str]:
        return list(range(len(prompts)))

    monkeypatch.setattr(answering, "_generate", generate)
    monkeypatch.setattr(answering, "_decode", lambda row, **_: outputs[row])
    generations: list[Generation] = []
    scores = evaluate(str(tiny_model), spec=spec, settings=settings, on_generations=generations.extend)
    assert [(score.metric, score.items) for score in scores] == [("exact_match", 4), ("f1", 4)]
    for generation in generations:
        right = generation.output.rstrip(".").lower() == generation.reference.lower()
        assert generation.scores["exact_match"] == 100 * right
        assert generation.spans == []
    assert scores[0].value == pytest.approx(sum(one.scores["exact_match"] for one in generations) / 4)


def test_no_benchmark_is_an_error(tiny_model: Path, settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no benchmark was named"):
        evaluate_to_directory(str(tiny_model), EvaluationSpec(), tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def _spec(*names: str, limit: int | None = None) -> EvaluationSpec:
    return EvaluationSpec.model_validate(
        {"benchmarks": list(names), "limit": limit, "max_new_tokens": 6, "batch_size": 2}
    )


def test_an_address_where_no_model_is_served_is_refused(tiny_model: Path, settings: Settings, tmp_path: Path) -> None:
    spec = _spec("demo_news", limit=1)
    with pytest.raises(EvaluationError, match=r"no model server answers at http://127\.0\.0\.1:9/v1") as caught:
        evaluate_to_directory(str(tiny_model), spec, tmp_path / "out", settings, server="http://127.0.0.1:9/v1")
    assert "vllm serve" in caught.value.fix


def test_answers_of_two_writers_are_not_mixed(tiny_model: Path, settings: Settings, tmp_path: Path) -> None:
    spec = _spec("demo_news", limit=1)
    evaluate_to_directory(str(tiny_model), spec, tmp_path / "out", settings)
    claimed = tmp_path / "out" / "evaluated.json"
    claim = json.loads(claimed.read_text())
    claimed.write_text(json.dumps(claim | {"answered_by": "a server with a window of 512 tokens"}))
    with pytest.raises(ConflictError, match="holds answers by a server with a window of 512 tokens, not by transform"):
        evaluate_to_directory(str(tiny_model), spec, tmp_path / "out", settings)
