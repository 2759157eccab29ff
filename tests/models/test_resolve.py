"""Names of models: local directories, the hub (a loopback one), and what is said when neither helps."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.contract.errors import ModelNotFoundError, UnsupportedError
from services.contract.settings import Settings
from services.models.resolve import resolve_model
from tests.models.fake_hub import COMMIT, serve_hub

REPOSITORY = Path(__file__).parents[2]


def test_a_model_directory_is_taken_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    assert resolve_model(str(tiny_model), settings=Settings(data_dir=tmp_path)) == str(tiny_model)


@pytest.mark.parametrize(
    ("removed", "named"),
    [("config.json", "config.json"), ("model.safetensors", "weights"), ("tokenizer.json", "a tokenizer")],
)
def test_an_incomplete_directory_names_what_it_lacks(
    tiny_model: Path, tmp_path: Path, removed: str, named: str
) -> None:
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    (broken / removed).unlink()
    with pytest.raises(ModelNotFoundError, match=f"lacks {named}"):
        resolve_model(str(broken), settings=Settings(data_dir=tmp_path))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_damaged_configuration_is_named(content: bytes, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_bytes(content)
    with pytest.raises(ModelNotFoundError, match=r"model/config\.json cannot be read as a JSON object"):
        resolve_model(str(tmp_path / "model"), settings=Settings(data_dir=tmp_path))


def test_a_lora_adapter_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match="LoRA adapter"):
        resolve_model(str(tmp_path), settings=Settings(data_dir=tmp_path))


def test_a_directory_has_no_revision(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no revision v2"):
        resolve_model(str(tiny_model), revision="v2", settings=Settings(data_dir=tmp_path))


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "~/absent", "a/b/c"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="there is no model directory"):
        resolve_model(name, settings=Settings(data_dir=tmp_path))


def test_without_a_hub_the_error_says_why_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model("no-such-owner/no-such-model", settings=Settings(data_dir=tmp_path, offline=True))
    assert "SMOOTHKD_OFFLINE" in caught.value.what
    assert "local model directory" in caught.value.fix


def test_a_name_that_no_hub_could_know(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="a model hub could know"):
        resolve_model("not a model!", settings=Settings(data_dir=tmp_path, offline=True))


def test_the_hub_is_used_when_it_answers(tiny_model: Path, tmp_path: Path) -> None:
    served = shutil.copytree(tiny_model, tmp_path / "served")
    (served / "onnx").mkdir()
    (served / "onnx" / "model.safetensors").write_text("the same weights in another format")
    with serve_hub(served, repository="owner/tiny") as (address, asked):
        directory = Path(_resolve_in_process("owner/tiny", address=address, home=tmp_path))
        unknown = _resolve_in_process("owner/other", address=address, home=tmp_path)
        revision = _resolve_in_process("owner/tiny", address=address, home=tmp_path, revision="v9")
    assert COMMIT in directory.name
    assert (directory / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    assert not (directory / "onnx").exists()
    assert asked.count("HEAD /") == 3
    assert "knows no model owner/other" in unknown
    assert "has no revision v9" in revision

    cached = _resolve_in_process("owner/tiny", address="http://127.0.0.1:9", home=tmp_path)
    assert Path(cached) == directory


def test_a_tokenizer_is_fetched_without_its_weights(tiny_model: Path, tmp_path: Path) -> None:
    with serve_hub(tiny_model, repository="owner/tiny") as (address, asked):
        directory = Path(_resolve_in_process("owner/tiny", address=address, home=tmp_path, what="tokenizer"))
    assert (directory / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
    assert not list(directory.glob("*.safetensors"))
    assert not [line for line in asked if "safetensors" in line]
    cached = _resolve_in_process("owner/tiny", address="http://127.0.0.1:9", home=tmp_path, what="tokenizer")
    assert Path(cached) == directory


def test_smollm2_stays_what_it_first_was(tiny_model: Path, tmp_path: Path) -> None:
    """Taken from the hub once, it is the same bytes when the hub is gone and when the hub's copy has changed."""
    served = shutil.copytree(tiny_model, tmp_path / "served")
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    with serve_hub(served, repository=name) as (address, _):
        directory = _resolve_in_process(name, address=address, home=tmp_path)
        (served / "config.json").write_text("{}")
        assert _resolve_in_process("smollm2-135m-instruct", address=address, home=tmp_path) == directory
    assert _resolve_in_process(name, address="http://127.0.0.1:9", home=tmp_path) == directory
    assert (Path(directory) / "config.json").read_bytes() == (tiny_model / "config.json").read_bytes()
    assert f'"origin": "model hub {name}"' in (Path(directory) / "manifest.json").read_text()


def _resolve_in_process(
    name: str, *, address: str, home: Path, revision: str | None = None, what: str = "model"
) -> str:
    """The resolved directory, or the error's text; the hub library reads its address once per process."""
    program = """
        import sys
        from services.contract.errors import InvalidInputError
        from services.contract.settings import Settings
        from services.models import resolve
        try:
            find = {"model": resolve.resolve_model, "tokenizer": resolve.resolve_tokenizer}[sys.argv[3]]
            print(find(sys.argv[1], revision=sys.argv[2] or None, settings=Settings()))
        except InvalidInputError as error:
            print(error.what)
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "SMOOTHKD_DATA_DIR": str(home / "data"),
        "PYTHONPATH": str(REPOSITORY),
        "NO_PROXY": "127.0.0.1",
    }
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), name, revision or "", what],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


@pytest.fixture(scope="module")
def pickled(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as it was saved before safetensors."""
    directory = tmp_path_factory.mktemp("pickled") / "model"
    shutil.copytree(tiny_model, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(AutoModelForCausalLM.from_pretrained(tiny_model).state_dict(), directory / "pytorch_model.bin")
    return directory


def test_weights_that_are_only_there_as_a_pickle_are_refused(pickled: Path, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    with pytest.raises(UnsupportedError, match=rf"{pickled} has no weights as safetensors"):
        resolve_model(str(pickled), settings=settings)
    with serve_hub(pickled, repository="owner/old") as (address, asked):
        told = _resolve_in_process("owner/old", address=address, home=tmp_path)
    assert "owner/old has no weights as safetensors" in told
    assert not [line for line in asked if "pytorch_model" in line]


def test_the_command_that_converts_a_pickle_does(pickled: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        resolve_model(str(pickled), settings=Settings(data_dir=tmp_path))
    code = re.search(r'python -c "(.*)"', caught.value.fix)
    assert code is not None
    converted = tmp_path / "converted"
    program = code[1].replace("MODEL", str(pickled)).replace("DIRECTORY", str(converted))
    subprocess.run([sys.executable, "-c", program], check=True)
    found = AutoModelForCausalLM.from_pretrained(resolve_model(str(converted), settings=Settings(data_dir=tmp_path)))
    expected = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
