"""Length-normalised accuracy through lm-evaluation-harness, against a plain computation on the same items."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.contract.errors import DatasetError, InvalidInputError
from services.contract.evaluation_spec import BenchmarkSpec
from services.contract.settings import Settings
from services.evaluation.model import LoadedModel, load_model
from services.evaluation.multiple_choice import MultipleChoice, answer_multiple_choice

FILES = {
    "arc_easy": "arc_easy/test.jsonl",
    "arc_challenge": "arc_challenge/test.jsonl",
    "hellaswag": "hellaswag/validation.jsonl",
    "openbookqa": "openbookqa/test.jsonl",
    "commonsense_qa": "commonsense_qa/validation.jsonl",
    "truthfulqa_mc1": "truthful_qa/mc1.jsonl",
}
METRICS = {"commonsense_qa": "acc", "truthfulqa_mc1": "acc"}


TRUTHFUL = """Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain.

Q: {question}
A:"""


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> LoadedModel:
    return load_model(str(tiny_model))


@pytest.mark.parametrize("name", FILES)
def test_it_equals_a_plain_computation(
    name: str, loaded: LoadedModel, tiny_model: Path, shared_data: Path, tmp_path: Path
) -> None:
    file = shared_data / FILES[name]
    score = _score(name, file, loaded=loaded, limit=30, tmp_path=tmp_path)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:30]]
    assert score.items == 30
    assert score.value == pytest.approx(_plain_accuracy(name, rows, tiny_model))
    assert (score.benchmark, score.metric) == (name, METRICS.get(name, "acc_norm"))


def test_parquet_gives_what_json_lines_give(loaded: LoadedModel, shared_data: Path, tmp_path: Path) -> None:
    import pyarrow.json
    import pyarrow.parquet

    lines = shared_data / FILES["arc_easy"]
    parquet = tmp_path / "arc.parquet"
    pyarrow.parquet.write_table(pyarrow.json.read_json(lines), parquet)
    from_lines = _score("arc_easy", lines, loaded=loaded, limit=20, tmp_path=tmp_path)
    assert _score("arc_easy", parquet, loaded=loaded, limit=20, tmp_path=tmp_path) == from_lines


def test_truthfulqa_mc2_is_the_share_of_the_true_answers_probability(
    loaded: LoadedModel, tiny_model: Path, tmp_path: Path
) -> None:
    rows = [
        {
            "question": "Do ferries fly?",
            "mc2_targets": {"choices": ["No.", "Not at all.", "Yes.", "Ferries fly."], "labels": [1, 1, 0, 0]},
        },
        {"question": "Is rain wet?", "mc2_targets": {"choices": ["It is.", "No."], "labels": [1, 0]}},
    ]
    file = tmp_path / "mc2.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = _score("truthfulqa_mc2", file, loaded=loaded, limit=None, tmp_path=tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)
    shares = []
    for row in rows:
        context = TRUTHFUL.format(question=row["question"])
        likelihoods = torch.tensor(
            [_log_likelihood(model, tokenizer, context, f" {one}") for one in row["mc2_targets"]["choices"]]
        )
        shares.append(float(likelihoods.softmax(0)[torch.tensor(row["mc2_targets"]["labels"]) == 1].sum()))
    assert score.value == pytest.approx(100 * sum(shares) / 2, abs=1e-3)


def test_items_are_computed_once_and_go_on_after_an_interruption(
    tiny_model: Path, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after some items, then carried on, then repeated: forward passes tell what was computed."""
    loaded = load_model(str(tiny_model))
    file = shared_data / FILES["arc_easy"]
    passes: list[int] = []
    plain = loaded.model.forward

    def forward(*arguments: object, **named: object) -> object:
        if len(passes) == stop:
            raise KeyboardInterrupt
        passes.append(1)
        return plain(*arguments, **named)

    monkeypatch.setattr(loaded.model, "forward", forward)
    stop = 6
    with pytest.raises(KeyboardInterrupt):
        _score("arc_easy", file, loaded=loaded, limit=10, tmp_path=tmp_path)
    stop = -1
    score = _score("arc_easy", file, loaded=loaded, limit=10, tmp_path=tmp_path)
    both = len(passes)
    assert _score("arc_easy", file, loaded=loaded, limit=10, tmp_path=tmp_path) == score
    assert len(passes) == both
    fresh = _score("arc_easy", file, loaded=loaded, limit=10, tmp_path=tmp_path / "elsewhere")
    assert fresh == score
    whole = len(passes) - both
    assert both <= whole + 1


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "holds no item"),
        ('{"question": "Why?"}\n', r"line 1: no column 'choices', 'answerKey'; arc_easy needs"),
        ("not json\n", "line 1: is not JSON"),
    ],
)
def test_an_unfit_file_is_named(text: str, error: str, loaded: LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text(text)
    with pytest.raises(DatasetError, match=error):
        _score("arc_easy", file, loaded=loaded, limit=None, tmp_path=tmp_path)


def test_examples_that_do_not_fit_into_the_window_are_refused_and_long_questions_counted(
    loaded: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"choices": {"text": [*"abcde"], "label": [*"ABCDE"]}, "answerKey": "A"}
    rows = [{**row, "question": "Where?"}, {**row, "question": "Who " * 600}, {**row, "question": "When?"}]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(f"{json.dumps(one)}\n" for one in rows))
    with pytest.raises(InvalidInputError, match="2 examples and a question are more than the model's window of 512"):
        _answered("commonsense_qa", file, loaded=loaded, limit=None, tmp_path=tmp_path, examples=2)
    found = _answered("commonsense_qa", file, loaded=loaded, limit=None, tmp_path=tmp_path)
    assert len(found.items) == 3
    assert "5 of 15 choices and their questions are longer than the model's window of 512 tokens" in caplog.text


def test_without_hub_and_file_the_error_says_what_to_do(
    loaded: LoadedModel, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "empty"))
    with pytest.raises(DatasetError, match="the data of openbookqa cannot be loaded") as caught:
        answer_multiple_choice(
            BenchmarkSpec(name="openbookqa"),
            loaded=loaded,
            directory=str(tiny_model),
            limit=2,
            batch_size=2,
            settings=Settings(data_dir=tmp_path, offline=True),
        )
    assert "local file" in caught.value.fix


def _score(name: str, file: Path, *, loaded: LoadedModel, limit: int | None, tmp_path: Path):
    return _answered(name, file, loaded=loaded, limit=limit, tmp_path=tmp_path).scores[0]


def _answered(
    name: str, file: Path, *, loaded: LoadedModel, limit: int | None, tmp_path: Path, examples: int = 0
) -> MultipleChoice:
    return answer_multiple_choice(
        BenchmarkSpec(name=name, path=str(file)),
        loaded=loaded,
        directory=str(loaded.model.config._name_or_path),
        limit=limit,
        batch_size=4,
        settings=Settings(data_dir=tmp_path, offline=True),
        examples=examples,
    )


def _plain_accuracy(name: str, rows: list[dict], directory: Path) -> float:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    right = 0
    for row in rows:
        context, choices, answer = _read(name, row)
        scores = [_log_likelihood(model, tokenizer, context, f" {choice}") for choice in choices]
        if name not in METRICS:
            scores = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        right += scores.index(max(scores)) == answer
    return 100 * right / len(rows)


def _read(name: str, row: dict) -> tuple[str, list[str], int]:
    if name == "hellaswag":
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        return _tidy(context), [_tidy(ending) for ending in row["endings"]], int(row["label"])
    if name == "truthfulqa_mc1":
        return TRUTHFUL.format(question=row["question"]), row["mc1_targets"]["choices"], 0
    labels = row["choices"]["label"]
    if name == "commonsense_qa":
        options = "".join(f"{label}. {text}\n" for label, text in zip("ABCDE", row["choices"]["text"], strict=True))
        return f"Question: {row['question'].strip()}\n{options}Answer:", list("ABCDE"), labels.index(row["answerKey"])
    context = row["question_stem"] if name == "openbookqa" else f"Question: {row['question']}\nAnswer:"
    return context, row["choices"]["text"], labels.index(row["answerKey"])


def _tidy(text: str) -> str:
    """HellaSwag's texts from WikiHow carry brackets, as its task in the library removes them."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


@torch.inference_mode()
def _log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    prefix = tokenizer.encode(context, add_special_tokens=False)
    ids = tokenizer.encode(context + continuation, add_special_tokens=False)
    log_probabilities = model(torch.tensor([ids[-513:-1]])).logits[0].log_softmax(-1)
    new = ids[len(prefix) :]
    return float(
        sum(log_probabilities[len(log_probabilities) - len(new) + place, id_] for place, id_ in enumerate(new))
    )
