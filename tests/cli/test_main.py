"""The command line and the documents that speak of it."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from services.contract.records import Summary, SummaryCell, SummaryRow
from services.contract.states import State

REPOSITORY = Path(__file__).parents[2]
SMOOTHKD = [sys.executable, "-m", "services.cli.main"]
COMMANDS = ("up", "demo", "doctor", "api", "teacher", "worker", "dashboard", "health", "fetch", "train", "evaluate")
COMMANDS += (
    "detect",
    "sweep submit",
    "sweep list",
    "sweep show",
    "sweep cancel",
    "sweep watch",
    "sweep cases",
    "report",
    "compare",
    "overconfidence",
    "lens train",
    "lens eval",
    "labels precompute",
    "labels export",
    "labels import",
    "labels info",
    "labels clear",
    "load-teacher",
)


def smoothkd(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        [*SMOOTHKD, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    result = smoothkd(*command.split(), "--help")
    assert result.returncode == 0, result.stderr
    assert "Usage:" in result.stdout


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom services.cli.main import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\nprint(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    roots = {name.partition(".")[0] for name in loaded.stdout.split()}
    assert roots.isdisjoint(
        {"torch", "transformers", "fastapi", "streamlit", "sqlalchemy", "redis", "grpc", "pydantic"}
    )


def test_commands_and_targets_of_the_readme_exist():
    text = (REPOSITORY / "README.md").read_text()
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    known = {command.split()[0] for command in COMMANDS}
    for command in re.findall(r"(?:`|^)smoothkd ([a-z-]+)", text, flags=re.MULTILINE):
        assert command in {*known, "distils"}, command
    for path in re.findall(r"`((?:services|student_trainer|teacher_server|docs|sweeps)/[\w./]+)`", text):
        assert (REPOSITORY / path).exists(), path


def test_a_wrong_sweep_file_is_refused_before_the_api_is_asked(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("name: x\nstudent: {modle: y}\ndataset: {path: z}\n")
    result = smoothkd("sweep", "submit", str(file), SMOOTHKD_API_URL="http://127.0.0.1:9")
    assert result.returncode == 2
    assert "student.modle" in result.stderr
    assert "did you mean model" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_absent_api_is_named_with_what_to_do():
    result = smoothkd("sweep", "list", SMOOTHKD_API_URL="http://127.0.0.1:9")
    assert result.returncode == 3
    assert "http://127.0.0.1:9" in result.stderr
    assert "smoothkd up" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_taken_port_is_named_and_nothing_else_said():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = {"SMOOTHKD_TEACHER_PORT": str(port), "SMOOTHKD_LABEL_CACHE_GIB": "0"}
        result = smoothkd("teacher", "--model", "300", "--engine", "mock", **settings)
    assert result.stderr.splitlines() == [
        f"error: another process listens on 127.0.0.1:{port}",
        "  Stop it, or set SMOOTHKD_TEACHER_PORT to a free port.",
    ]


def test_a_setting_that_cannot_be_used_is_named():
    result = smoothkd("doctor", SMOOTHKD_API_PORT="abc", SMOOTHKD_QUEUE_PORT="70000")
    assert result.returncode == 2
    assert "SMOOTHKD_API_PORT" in result.stderr
    assert "SMOOTHKD_QUEUE_PORT" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_package_is_named_with_its_extra(tmp_path):
    (tmp_path / "rq.py").write_text("raise ModuleNotFoundError('No module named rq', name='rq')")
    result = smoothkd("worker", PYTHONPATH=str(tmp_path))
    assert result.returncode == 3
    assert "smoothkd[store]" in result.stderr
    assert "Traceback" not in result.stderr


def test_doctor_says_what_is_there_and_what_is_not(tmp_path):
    result = smoothkd("doctor", SMOOTHKD_DATA_DIR=str(tmp_path), SMOOTHKD_API_URL="http://127.0.0.1:9")
    assert result.returncode == 0, result.stderr
    for word in ("torch", "streamlit", "memory", "store", "teacher", "http://127.0.0.1:9"):
        assert word in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_doctor_names_the_extra_of_an_absent_package(monkeypatch, capsys, tmp_path):
    from services.cli import doctor
    from services.contract.settings import Settings

    monkeypatch.setitem(doctor.OPTIONAL, "no-such-package", "api")
    assert doctor.run_doctor(Settings(data_dir=tmp_path)) == 0
    assert "smoothkd[api]" in capsys.readouterr().out


def test_summary_table_marks_the_best_and_says_why_a_metric_is_missing():
    from rich.console import Console

    from services.cli.sweep_views import summary_table

    def cell(metric, mean, **more):
        return SummaryCell(benchmark="xsum", metric=metric, mean=mean, std=more.pop("std", None), runs=2, **more)

    rows = [
        SummaryRow(
            method="SFT", alpha=0, runs=2, ended=2, cells=[cell("rouge_l", 20.123, std=0.5), cell("support", 80.0)]
        ),
        SummaryRow(
            method="KD alpha=1",
            alpha=1,
            runs=2,
            ended=1,
            cells=[cell("rouge_l", 21.0, best=True), cell("support", None, missing="empty")],
        ),
    ]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(Summary(sweep_id="sw-1", state=State.RUNNING, rows=rows), width=100))
    console.file.close()
    text = console.export_text(clear=False)
    assert "20.12±0.50" in text
    assert "– (empty)" in text
    assert "1/2" in text
    styled = console.export_text(styles=True)
    assert "\x1b[1;32m21.00" in styled


def test_a_summary_of_many_methods_and_metrics_is_whole_in_80_columns():
    from rich.console import Console

    from services.cli.sweep_views import summary_table
    from services.contract.metric_words import metric_title

    def cell(benchmark, metric, mean):
        missing = "no such model here" if mean is None else None
        return SummaryCell(benchmark=benchmark, metric=metric, mean=mean, std=mean and 1.25, runs=6, missing=missing)

    metrics = ("rouge_l", "factual_rate", "bertscore")
    alphas = (0.0, 0.01, 0.1, 1.0, 10.0)
    rows = [
        SummaryRow(
            method=f"KD alpha={alpha:g}",
            alpha=alpha,
            runs=6,
            ended=6,
            cells=[
                cell(benchmark, metric, None if metric == "bertscore" else 50 + place + step)
                for benchmark in ("cnn_dailymail", "xsum")
                for step, metric in enumerate(metrics)
            ],
        )
        for place, alpha in enumerate(alphas)
    ]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(Summary(sweep_id="sw-1", state=State.SUCCEEDED, rows=rows), width=80))
    console.file.close()
    text = console.export_text()
    shown = [[part.strip() for part in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert shown == [
        line
        for benchmark in ("cnn_dailymail", "xsum")
        for line in (
            [benchmark, *[""] * 5],
            [metric_title("rouge_l"), *(f"{50 + place:.2f}±1.25" for place in range(5))],
            [metric_title("factual_rate"), *(f"{51 + place:.2f}±1.25" for place in range(5))],
            [metric_title("bertscore"), *["–"] * 5],
        )
    ]
    assert text.count("no such model here") == 1
    for alpha in alphas:
        assert f"alpha={alpha:g}" in text


def test_a_sweep_names_its_judges_from_where_its_file_lies(tmp_path):
    from services.cli.sweep_views import with_absolute_paths
    from services.contract.spec_reading import parse_sweep

    (tmp_path / "lens.json").write_text("{}")
    for shipped in ("smollm2-135m-instruct", "demo_instructions", "demo_news"):
        # Called like something that comes with the project, which they do not hide.
        (tmp_path / shipped).mkdir()
    spec = parse_sweep(
        {
            "name": "judged",
            "student": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct"},
            "dataset": {"path": "demo_instructions"},
            "evaluation": {
                "benchmarks": [{"name": "xsum", "path": "demo_news"}],
                "metrics": ["factual_rate", "entailment", "bertscore"],
                "judges": {"lens": "lens.json", "nli": "cross-encoder/nli-deberta-v3-base", "idf": True},
            },
        }
    )
    absolute = with_absolute_paths(spec, tmp_path / "sweep.yaml")
    assert absolute.dataset.path == "demo_instructions"
    assert absolute.evaluation.benchmarks[0].path == "demo_news"
    judges = absolute.evaluation.judges
    assert judges.lens == str(tmp_path / "lens.json")
    assert judges.nli == "cross-encoder/nli-deberta-v3-base"
    assert judges.idf is True
    shipped = spec.evaluation.model_copy(update={"judges": judges.model_copy(update={"lens": "smollm2-135m-instruct"})})
    spec = spec.model_copy(update={"evaluation": shipped})
    assert with_absolute_paths(spec, tmp_path / "sweep.yaml").evaluation.judges.lens == "smollm2-135m-instruct"


@pytest.mark.parametrize("port", ["0", "99999"])
def test_a_metrics_port_that_is_none_is_refused(port):
    done = smoothkd("teacher", "--model", "300", "--engine", "mock", "--metrics-port", port)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "--metrics-port" in done.stderr
