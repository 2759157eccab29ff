"""The committed stubs are what the .proto gives, and the .proto keeps buf's rules."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROTO = "services/contract/teacher/v1/teacher_service.proto"
# Console scripts of the environment that runs the tests, activated or not.
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stubs")
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", "-I", "."),
            *(f"--python_out={out}", f"--grpc_python_out={out}", f"--mypy_out={out}", PROTO),
        ],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        check=True,
        capture_output=True,
    )
    return out


@pytest.mark.parametrize("suffix", ["_pb2.py", "_pb2.pyi", "_pb2_grpc.py"])
def test_stubs_have_not_drifted(suffix: str, generated: Path) -> None:
    stub = PROTO.replace(".proto", suffix)
    assert (REPOSITORY / stub).read_text() == (generated / stub).read_text(), (
        "run: python -m grpc_tools.protoc -I . --python_out=. --grpc_python_out=. --mypy_out=. " + PROTO
    )


def test_nothing_else_is_generated(generated: Path) -> None:
    folder = Path(PROTO).parent
    made = {path.name for path in (generated / folder).iterdir()}
    committed = {path.name for path in (REPOSITORY / folder).glob("*_pb2*")}
    assert made == committed


def test_buf_lint_passes() -> None:
    lint = subprocess.run(
        ["buf", "lint"], cwd=REPOSITORY / "services" / "contract", env=ENVIRONMENT, capture_output=True, text=True
    )
    assert lint.returncode == 0, lint.stdout + lint.stderr
