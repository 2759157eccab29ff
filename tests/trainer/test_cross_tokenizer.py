"""Teachers with another tokenizer: where both have read the same, and whole runs that learn from one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.contract.errors import DatasetError, HandshakeError, SpecError
from services.contract.records import MetricPoint
from services.contract.settings import Settings
from services.models.tiny import make_tiny_model
from student_trainer.data import encode_examples
from student_trainer.precompute import precompute_labels
from student_trainer.readings import with_readings
from student_trainer.train import train
from teacher_server.server import TeacherOptions
from tests.teacher.serving import running_teacher
from tests.trainer.conftest import RECORDS
from tests.trainer.misaligned import ENCODINGS, go_wrong, stopped
from tests.trainer.runs import MakeRun, assert_close_weights, assert_same_bits
from tests.trainer.universal_reference import ULD, expected_pairs, mean_distance, metaspace_tokenizer

TEXTS = [
    "The harbour master of Ostrel said on Tuesday that 14 ferries had been repaired.",
    "naïve façade — “quoted” …  two  blanks\n\n\tand a tab, 12345 don't",
    "👩‍🔬 found 🦊 in 今日は。 Größe",
    "x",
    "  leading and trailing  ",
]


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fewer tokens than the student's, and others."""
    directory = make_tiny_model(tmp_path_factory.mktemp("other"), seed=5, hidden_size=48, vocab_size=275)
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def other_address(other_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    cached = Settings(label_cache_dir=tmp_path_factory.mktemp("cache"))
    options = TeacherOptions(model=str(other_teacher), engine="transformers", port=0, label_dtype="float32")
    with running_teacher(options, settings=cached) as address:
        yield address


@pytest.fixture
def uld_settings(settings: Settings, other_address: str) -> Settings:
    return settings.model_copy(update={"teacher_address": other_address})


@pytest.mark.parametrize("pair", ["byte-level and byte-level", "byte-level and metaspace", "metaspace and byte-level"])
def test_labels_stand_where_both_have_read_the_same_text(pair: str, student_model: Path, other_teacher: Path) -> None:
    tokenizers = {
        "byte-level and byte-level": (student_model, other_teacher),
        "byte-level and metaspace": (student_model, None),
        "metaspace and byte-level": (None, other_teacher),
    }
    student, teacher = (
        AutoTokenizer.from_pretrained(directory) if directory else metaspace_tokenizer()
        for directory in tokenizers[pair]
    )
    records = [{"instruction": "Write.", "context": "", "response": text} for text in TEXTS]
    examples = encode_examples(records, student, max_length=4096)
    read = with_readings(examples, records, tokenizer=student, teacher=teacher, teacher_max_length=None)
    assert len(read) == len(TEXTS)
    for example, text in zip(read, TEXTS, strict=True):
        assert example.reading is not None
        prompt = example.reading.label_positions[0]
        found = [
            (place, position - prompt)
            for place, position in zip(example.reading.response_places, example.reading.label_positions, strict=True)
        ]
        assert found == expected_pairs(example, student, text.strip(), teacher)
        # At its start and at its end both have read the same.
        assert found[0] == (0, 0)
        assert found[-1] == (len(example.response_positions) - 1, len(example.reading.token_ids) - 1 - prompt)


def test_real_tokenizers_agree_on_most_of_a_text(smollm2: Path, student_model: Path) -> None:
    student, teacher = AutoTokenizer.from_pretrained(smollm2), AutoTokenizer.from_pretrained(student_model)
    records = [{"instruction": "Write.", "context": "", "response": text} for text in TEXTS]
    examples = encode_examples(records, student, max_length=4096)
    read = with_readings(examples, records, tokenizer=student, teacher=teacher, teacher_max_length=None)
    for example, text in zip(read, TEXTS, strict=True):
        assert example.reading is not None
        prompt = example.reading.label_positions[0]
        pairs = expected_pairs(example, student, text.strip(), teacher)
        assert example.reading.response_places == [place for place, _ in pairs]
        assert example.reading.label_positions == [prompt + other for _, other in pairs]
    assert read[0].reading is not None
    assert len(read[0].reading.response_places) > 0.8 * len(read[0].response_positions)


def test_records_that_are_too_long_for_the_teacher_alone_are_left_out(
    student_model: Path, other_teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student, teacher = (AutoTokenizer.from_pretrained(directory) for directory in (student_model, other_teacher))
    examples = encode_examples(RECORDS, student, max_length=512)
    whole = with_readings(examples, RECORDS, tokenizer=student, teacher=teacher, teacher_max_length=None)
    lengths = sorted(len(example.reading.token_ids) for example in whole if example.reading)
    with caplog.at_level("WARNING"):
        kept = with_readings(examples, RECORDS, tokenizer=student, teacher=teacher, teacher_max_length=lengths[4])
    assert len(kept) == sum(length <= lengths[4] for length in lengths)
    assert f"left out {10 - len(kept)} of 10 records" in caplog.text
    with pytest.raises(DatasetError, match=f"the longest has {lengths[-1]}"):
        with_readings(examples, RECORDS, tokenizer=student, teacher=teacher, teacher_max_length=lengths[0] - 1)


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_minimises_the_distance_of_sorted_probabilities(
    packing: bool, make_run: MakeRun, uld_settings: Settings, student_model: Path, other_teacher: Path, tmp_path: Path
) -> None:
    """The first step logs that of the untrained student, as transformers' own logits give it."""
    points: list[MetricPoint] = []
    spec = make_run(
        alpha=10.0,
        batch_size=10,
        teacher={"model": str(other_teacher)},
        distillation=ULD,
        training={"epochs": 20, "packing": packing},
    )
    model = train(spec, out=tmp_path / "run", settings=uld_settings, on_metrics=points.extend)
    soft = [point.value for point in points if point.name == "soft_loss"]
    before = mean_distance(student_model, other_teacher)
    assert soft[0] == pytest.approx(before, rel=1e-4)
    assert soft[-1] < 0.5 * before
    assert mean_distance(model, other_teacher) < 0.5 * before


@pytest.mark.parametrize("labels", [{"encoding": "full"}, {"encoding": "top_k", "k": 1024}])
def test_every_encoding_trains_nearly_the_same_student(
    labels: dict, make_run: MakeRun, uld_settings: Settings, student_model: Path, other_teacher: Path, tmp_path: Path
) -> None:
    models = [
        train(
            make_run(
                alpha=1.0,
                learning_rate=1e-3,
                teacher={"model": str(other_teacher)},
                distillation=ULD | {"labels": chosen},
            ),
            out=tmp_path / chosen["encoding"],
            settings=uld_settings,
        )
        for chosen in ({"encoding": "exact"}, labels)
    ]
    assert_close_weights(*models, start=student_model, share=0.05)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_teacher_that_goes_wrong_in_mid_run_stops_it(
    encoding: str,
    make_run: MakeRun,
    uld_settings: Settings,
    other_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its labels are compared at its own tokens, of which the student has others."""
    go_wrong(monkeypatch, at=uld_settings.teacher_address)
    spec = make_run(
        alpha=1.0,
        teacher={"model": str(other_teacher)},
        distillation=ULD | {"labels": ENCODINGS[encoding]},
        training={"checkpoint_steps": 1},
    )
    with stopped(tmp_path / "run", teacher=other_teacher):
        train(spec, out=tmp_path / "run", settings=uld_settings)


def test_labels_in_files_train_the_same_student(
    make_run: MakeRun, uld_settings: Settings, settings: Settings, other_teacher: Path, tmp_path: Path
) -> None:
    run = make_run(alpha=1.0, teacher={"model": str(other_teacher)}, distillation=ULD)
    done = precompute_labels([run], settings=uld_settings, out=tmp_path / "labels")
    assert done.sequences == len(RECORDS)
    in_files = make_run(
        alpha=1.0,
        teacher={"model": str(other_teacher)},
        distillation=ULD | {"labels": {"path": str(tmp_path / "labels")}},
    )
    assert_same_bits(
        train(in_files, out=tmp_path / "files", settings=settings),
        train(run, out=tmp_path / "served", settings=uld_settings),
    )


def test_another_tokenizer_is_refused_with_the_way_out(
    make_run: MakeRun, uld_settings: Settings, other_teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(HandshakeError, match="token ids") as caught:
        train(make_run(alpha=1.0, teacher={"model": str(other_teacher)}), out=tmp_path / "run", settings=uld_settings)
    assert "distillation.cross_tokenizer: uld" in caught.value.fix
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_serves_another_tokenizer_than_its_model_has_here_is_refused(
    make_run: MakeRun, uld_settings: Settings, other_teacher: Path, tmp_path: Path
) -> None:
    """The teacher's directory got another tokenizer after the server had read it."""
    moved = tmp_path / "moved"
    make_tiny_model(moved, vocab_size=285)
    options = TeacherOptions(model=str(moved), engine="mock", port=0)
    with running_teacher(options) as address:
        AutoTokenizer.from_pretrained(other_teacher).save_pretrained(moved)
        here = uld_settings.model_copy(update={"teacher_address": address})
        with pytest.raises(HandshakeError, match="is not the one at the teacher"):
            train(
                make_run(alpha=1.0, teacher={"model": str(moved)}, distillation=ULD),
                out=tmp_path / "run",
                settings=here,
            )


@pytest.mark.parametrize(
    ("distillation", "words"),
    [
        ({"labels": {"encoding": "sampled", "draws": 5}}, "sorted probabilities, which sampled labels do not give"),
        ({"divergence": "reverse_kl"}, "compares token with token"),
    ],
)
def test_what_cannot_be_compared_across_tokenizers_is_refused(
    distillation: dict, words: str, make_run: MakeRun
) -> None:
    with pytest.raises(SpecError, match=words):
        make_run(alpha=1.0, distillation=ULD | distillation)
