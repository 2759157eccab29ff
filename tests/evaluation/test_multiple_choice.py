"""Length-normalised accuracy through lm-evaluation-harness, against a plain computation on the same items."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.contract.errors import DatasetError
from services.contract.evaluation_spec import BenchmarkSpec
from services.contract.settings import Settings
from services.evaluation.model import LoadedModel, load_model
from services.evaluation.multiple_choice import score_multiple_choice

FILES = {
    "arc_easy": "arc_easy/test.jsonl",
    "arc_challenge": "arc_challenge/test.jsonl",
    "hellaswag": "hellaswag/validation.jsonl",
    "openbookqa": "openbookqa/test.jsonl",
}


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
    assert (score.benchmark, score.metric) == (name, "acc_norm")


def test_parquet_gives_what_json_lines_give(loaded: LoadedModel, shared_data: Path, tmp_path: Path) -> None:
    import pyarrow.json
    import pyarrow.parquet

    lines = shared_data / FILES["arc_easy"]
    parquet = tmp_path / "arc.parquet"
    pyarrow.parquet.write_table(pyarrow.json.read_json(lines), parquet)
    from_lines = _score("arc_easy", lines, loaded=loaded, limit=20, tmp_path=tmp_path)
    assert _score("arc_easy", parquet, loaded=loaded, limit=20, tmp_path=tmp_path) == from_lines


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


def test_without_hub_and_file_the_error_says_what_to_do(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "empty"))
    with pytest.raises(DatasetError, match="the data of openbookqa cannot be loaded") as caught:
        score_multiple_choice(
            BenchmarkSpec(name="openbookqa"),
            loaded=loaded,
            limit=2,
            batch_size=2,
            settings=Settings(data_dir=tmp_path, offline=True),
        )
    assert "local file" in caught.value.fix


def _score(name: str, file: Path, *, loaded: LoadedModel, limit: int | None, tmp_path: Path):
    return score_multiple_choice(
        BenchmarkSpec(name=name, path=str(file)),
        loaded=loaded,
        limit=limit,
        batch_size=4,
        settings=Settings(data_dir=tmp_path, offline=True),
    )


def _plain_accuracy(name: str, rows: list[dict], directory: Path) -> float:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    right = 0
    for row in rows:
        context, choices, answer = _read(name, row)
        per_character = [_log_likelihood(model, tokenizer, context, f" {choice}") / len(choice) for choice in choices]
        right += per_character.index(max(per_character)) == answer
    return 100 * right / len(rows)


def _read(name: str, row: dict) -> tuple[str, list[str], int]:
    if name == "hellaswag":
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        return _tidy(context), [_tidy(ending) for ending in row["endings"]], int(row["label"])
    labels = row["choices"]["label"]
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
    return float(sum(log_probabilities[len(ids) - 1 - len(new) + place, id_] for place, id_ in enumerate(new)))
