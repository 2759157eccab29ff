import copy
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from services.contract.errors import SpecError
from services.contract.spec import SweepSpec, expand
from services.contract.spec_reading import load_run, load_sweep, parse_run, parse_sweep
from services.contract.states import State, combined_state

REPOSITORY = Path(__file__).parents[2]
SWEEP = {
    "name": "small",
    "teacher": {"model": "org/teacher"},
    "student": {"model": "org/student"},
    "dataset": {"path": "data.jsonl"},
    "grid": {"alpha": [0, 0.1], "learning_rate": [1e-5, 5e-6], "batch_size": [2, 4], "seed": [0, 1]},
    "training": {"epochs": 1, "max_length": 512},
    "evaluation": {"benchmarks": ["cnn_dailymail", {"name": "xsum", "path": "xsum.jsonl"}]},
}

alphas = st.lists(st.floats(0, 10, allow_subnormal=False), min_size=1, max_size=3, unique=True)
learning_rates = st.lists(st.floats(1e-7, 1e-2), min_size=1, max_size=3, unique=True)
batch_sizes = st.lists(st.integers(1, 64), min_size=1, max_size=3, unique=True)
seeds = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3, unique=True)


@given(alphas, learning_rates, batch_sizes, seeds)
def test_expand_is_the_ordered_product_of_the_grid(alpha, learning_rate, batch_size, seed):
    grid = {"alpha": alpha, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
    sweep = parse_sweep({**SWEEP, "grid": grid})
    runs = expand(sweep)
    points = [(run.alpha, run.learning_rate, run.batch_size, run.seed) for run in runs]
    assert points == list(itertools.product(alpha, learning_rate, batch_size, seed))
    assert expand(sweep) == runs
    assert len({run.key for run in runs}) == len(runs)
    assert [(run.teacher is None) for run in runs] == [run.alpha == 0 for run in runs]


@given(alphas, seeds)
def test_run_survives_json_and_yaml_unchanged(alpha, seed):
    for run in expand(parse_sweep({**SWEEP, "grid": {"alpha": alpha, "seed": seed}})):
        assert parse_run(run.model_dump(mode="json")) == run
        again = parse_run(yaml.safe_load(yaml.safe_dump(run.model_dump(mode="json"))))
        assert again.key == run.key


def test_keys_depend_on_content_alone_and_not_on_the_process():
    sweep = parse_sweep(SWEEP)
    keys = [run.key for run in expand(sweep)]
    renamed = parse_sweep({**SWEEP, "name": "another-name"})
    assert [run.key for run in expand(renamed)] == keys
    code = (
        "import json, sys; from services.contract.spec import expand; "
        "from services.contract.spec_reading import parse_sweep; "
        "print(*[run.key for run in expand(parse_sweep(json.load(sys.stdin)))])"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", code],
        input=sweep.model_dump_json(),
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    assert elsewhere.stdout.split() == keys


def test_every_field_of_a_run_changes_its_key():
    (run,) = expand(parse_sweep({**SWEEP, "grid": {"alpha": 0.1}}))
    changes = [
        {"student": {"model": "org/other"}},
        {"teacher": {"model": "org/other"}},
        {"dataset": {"path": "other.jsonl"}},
        {"distillation": {"temperature": 2.0}},
        {"alpha": 0.2},
        {"learning_rate": 1e-4},
        {"batch_size": 8},
        {"seed": 1},
        {"training": {"epochs": 2, "max_length": 512}},
        {"evaluation": {"benchmarks": ["xsum"]}},
    ]
    assert {next(iter(change)) for change in changes} == set(type(run).model_fields)
    keys = {parse_run({**run.model_dump(mode="json"), **change}).key for change in changes}
    assert len(keys | {run.key}) == len(changes) + 1


def test_an_idf_that_nobody_asks_for_leaves_keys_as_they_were():
    run = {"student": {"model": "org/student"}, "dataset": {"path": "demo_instructions"}}
    plain, off, on = (
        parse_run({**run, "evaluation": {"metrics": ["bertscore"], "judges": judges}})
        for judges in ({}, {"idf": False}, {"idf": True})
    )
    assert "idf" not in plain.model_dump_json()
    assert plain.key == off.key != on.key
    assert parse_run(on.model_dump(mode="json")) == on


def test_projected_labels_go_with_students_that_train_adapters():
    labels = {"labels": {"encoding": "projected"}}
    sweep = {**SWEEP, "student": {"model": "org/student", "lora": {"rank": 8}}, "distillation": labels}
    assert expand(parse_sweep(sweep))[-1].distillation.labels.encoding == "projected"
    run = expand(parse_sweep(sweep))[-1].model_dump(mode="json")
    with pytest.raises(SpecError, match="output head is frozen"):
        parse_run({**run, "student": {"model": "org/student"}})


def test_sft_baseline_is_the_same_run_in_sweeps_with_different_teachers():
    first = parse_sweep(SWEEP)
    second = parse_sweep({**SWEEP, "teacher": {"model": "org/larger"}, "distillation": {"temperature": 3.0}})
    assert expand(first)[0].key == expand(second)[0].key
    assert expand(first)[-1].key != expand(second)[-1].key


@pytest.mark.parametrize(
    ("level", "alpha", "method"),
    [
        ("word", 0, "SFT"),
        ("word", 0.1, "KD alpha=0.1"),
        ("sequence", 0, "SeqKD"),
        ("word+sequence", 10, "SeqKD+KD alpha=10"),
    ],
)
def test_method_names(level, alpha, method):
    sweep = parse_sweep({**SWEEP, "distillation": {"level": level}, "grid": {"alpha": alpha}})
    assert [run.method for run in expand(sweep)] == [method]


def change(path: str, value: object) -> dict:
    """SWEEP with the field at ``path`` set to ``value``; a value of ... removes it."""
    data = copy.deepcopy(SWEEP)
    *parents, last = path.split(".")
    target = data
    for parent in parents:
        target = target.setdefault(parent, {})
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("grid.alpha", [-0.5], ["grid.alpha.0", "-0.5", "greater than or equal to 0"]),
        ("grid.alpha", [], ["grid.alpha", "[]", "at least one"]),
        ("grid.alpha", [0.1, 0.1], ["grid.alpha", "0.1", "once"]),
        ("grid.alpha", [float("nan")], ["grid.alpha.0", "finite"]),
        ("grid.alpha", [float("inf")], ["grid.alpha.0", "finite"]),
        ("grid.alpha", ["high"], ["grid.alpha.0", "'high'", "number"]),
        ("grid.learning_rate", [0], ["grid.learning_rate.0", "0", "greater than 0"]),
        ("grid.batch_size", [0], ["grid.batch_size.0", "0", "greater than or equal to 1"]),
        ("grid.batch_size", [2.5], ["grid.batch_size.0", "2.5"]),
        ("grid.seed", [-1], ["grid.seed.0", "-1"]),
        ("grid.lr", [1e-5], ["grid.lr", "unknown", "learning_rate"]),
        ("trainning", {}, ["trainning", "did you mean training"]),
        ("student.modle", "x", ["student.modle", "did you mean model"]),
        ("student", ..., ["student", "missing"]),
        ("student.model", "", ["student.model", "at least 1 character"]),
        ("name", "Bad Name", ["name", "'Bad Name'", "lower-case letter"]),
        ("teacher", None, ["needs a teacher", "teacher.model"]),
        ("teacher.finetune", {"method": "magic"}, ["teacher.finetune.method", "'magic'", "'full' or 'lora'"]),
        ("distillation", {"level": "sequence"}, ["level sequence", "word+sequence"]),
        ("distillation", {"labels": {"encoding": "top_k"}}, ["distillation.labels", "needs k"]),
        ("distillation", {"labels": {"encoding": "exact", "k": 5}}, ["distillation.labels", "remove k"]),
        ("distillation", {"labels": {"encoding": "json"}}, ["distillation.labels.encoding", "'json'", "'exact'"]),
        ("distillation", {"labels": {"encoding": "sampled"}}, ["distillation.labels", "needs draws", "draws: 50"]),
        ("distillation", {"labels": {"encoding": "sampled", "draws": 1025}}, ["distillation.labels.draws", "1024"]),
        ("distillation", {"labels": {"encoding": "sampled", "draws": 50, "seed": 3}}, []),
        ("distillation", {"labels": {"encoding": "exact", "draws": 5}}, ["distillation.labels", "remove draws"]),
        ("distillation", {"labels": {"encoding": "exact", "seed": 5}}, ["labels.seed only goes with encoding sampled"]),
        ("distillation", {"labels": {"encoding": "projected"}}, ["output head is frozen", "student.lora", "exact"]),
        ("distillation", {"divergence": "jsd", "beta": 0.1}, []),
        ("distillation", {"divergence": "kl"}, ["distillation.divergence", "'kl'", "'forward_kl'"]),
        ("distillation", {"divergence": "jsd", "beta": 1}, ["distillation.beta", "less than 1"]),
        ("distillation", {"beta": 0.5}, ["beta only goes with divergence jsd"]),
        (
            "distillation",
            {"divergence": "reverse_kl", "labels": {"encoding": "top_k", "k": 4}},
            ["reverse_kl needs the whole distribution", "exact"],
        ),
        ("student.lora", {}, []),
        ("student.lora", {"target_modules": "q_proj"}, []),
        ("student.lora", {"target_modules": []}, ["student.lora.target_modules", "at least 1"]),
        ("student.lora", {"rank": 0}, ["student.lora.rank", "0"]),
        ("student.lora", {"dropout": 1}, ["student.lora.dropout", "less than 1"]),
        ("student.lora", {"quantize": "int3"}, ["student.lora.quantize", "'int3'", "'nf4'"]),
        ("distillation", {"temperature": 0}, ["distillation.temperature", "0", "greater than 0"]),
        ("training.micro_batch_size", 4, []),
        ("training.micro_batch_size", 3, ["micro_batch_size 3", "batch_size 4", "divisor"]),
        ("training.precision", "int8", ["training.precision", "'int8'", "'bf16'"]),
        ("evaluation.benchmarks", ["cnn"], ["evaluation.benchmarks.0.name", "'cnn'", "'cnn_dailymail'"]),
        ("evaluation.benchmarks", ["xsum", "xsum"], ["evaluation", "xsum", "once"]),
        ("evaluation.limit", 0, ["evaluation.limit", "0"]),
        ("dataset", "data.jsonl", ["dataset", "'data.jsonl'"]),
    ],
)
def test_malformed_sweep_names_field_value_and_way_out(path, value, words):
    if not words:
        parse_sweep(change(path, value))
        return
    with pytest.raises(SpecError) as error:
        parse_sweep(change(path, value))
    for word in words:
        assert word in error.value.what
    assert error.value.fix


@pytest.mark.parametrize("data", [None, [], "name: x", 3])
def test_what_is_no_mapping_is_refused(data):
    with pytest.raises(SpecError, match="mapping"):
        parse_sweep(data)


def test_all_mistakes_are_reported_at_once():
    data = change("grid.alpha", [-1])
    data["student"] = {}
    with pytest.raises(SpecError) as error:
        parse_sweep(data)
    assert "grid.alpha.0" in error.value.what
    assert "student.model" in error.value.what
    assert len(error.value.details) == 2


def test_yaml_numbers_in_scientific_notation_are_numbers(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(SWEEP).replace("5.0e-06", "5e-6"))
    assert "5e-6" in file.read_text()
    assert load_sweep(file).grid.learning_rate == (1e-5, 5e-6)


@pytest.mark.parametrize(
    ("text", "words"),
    [("name: [", "not YAML"), ("name: x\nname: y\n", "twice"), ("\xff".encode("latin-1"), "cannot read")],
)
def test_unreadable_yaml_says_so(tmp_path, text, words):
    file = tmp_path / "sweep.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpecError, match=words):
        load_sweep(file)
    with pytest.raises(SpecError, match="cannot read"):
        load_run(tmp_path / "absent.yaml")


@pytest.mark.parametrize("file", sorted((REPOSITORY / "sweeps").glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_sweeps_hold(file):
    sweep = load_sweep(file)
    assert isinstance(sweep, SweepSpec)
    if file.name == "demo.yaml":
        return
    assert file.stem == sweep.name
    small = sweep.distillation.cross_tokenizer is not None
    assert len(expand(sweep)) == (24 if small else 30)
    assert sweep.grid.alpha == ((0, 0.1, 1.0, 1.5) if small else (0, 0.01, 0.1, 1.0, 10.0))


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        ([], "queued"),
        (["queued", "queued"], "queued"),
        (["queued", "succeeded"], "running"),
        (["running"], "running"),
        (["succeeded", "succeeded"], "succeeded"),
        (["succeeded", "failed", "skipped"], "failed"),
        (["succeeded", "cancelled"], "cancelled"),
        (["failed", "running"], "running"),
    ],
)
def test_state_of_a_whole(parts, whole):
    assert combined_state(State(part) for part in parts) == whole


def test_contract_pulls_in_nothing_heavy():
    modules = [
        path.with_suffix("").relative_to(REPOSITORY).as_posix().replace("/", ".")
        for path in (REPOSITORY / "services" / "contract").rglob("*.py")
        if path.name != "__init__.py"
    ]
    code = f"import importlib, sys; [importlib.import_module(m) for m in {modules!r}]; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    roots = {name.partition(".")[0] for name in loaded.stdout.split()}
    assert roots.isdisjoint({"torch", "transformers", "vllm", "fastapi", "streamlit", "redis", "rq", "sqlalchemy"})
    assert "services.contract.soft_labels" in loaded.stdout.split()
