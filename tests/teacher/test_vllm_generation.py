"""Decoding by a real vLLM, a teacher's second engine: what it writes, refuses and gives up, and how it ends."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.contract.errors import InvalidInputError, LimitExceededError, SmoothKDError, TeacherError
from services.contract.sequences import Continuation, DecodeOptions, Prompt, TokenSequence
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.teacher.v1.teacher_service_pb2_grpc import TeacherServiceStub
from services.models.tiny import make_tiny_model
from student_trainer.teacher_client import TeacherClient
from tests.teacher.serving import wait_until
from tests.teacher.test_generation import assert_samples_follow_the_distribution
from tests.teacher.test_vllm import PYTHON, Served, start, stop

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.exists(), reason="needs vLLM in .venv-vllm; make setup-vllm builds it"),
]

WINDOW = 256
SPOILT = 299
"""A token whose embedding is no number, which a start cannot notice."""
PADDED_ROWS = 37
PROMPTS = [
    Prompt(id=f"p{index}", token_ids=[3 + index * 5 + place for place in range(3 + 2 * index)]) for index in range(6)
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that would rather write rows that are no tokens, and recommends penalties that a teacher never heeds."""
    directory = make_tiny_model(
        tmp_path_factory.mktemp("generation") / "model", seed=4, hidden_size=256, padded_rows=PADDED_ROWS
    )
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.2, generator=torch.Generator().manual_seed(4))
        model.lm_head.weight[-PADDED_ROWS:] *= 50
        model.get_input_embeddings().weight[SPOILT] = float("nan")
        # Nor does it write that token by itself.
        model.lm_head.weight[SPOILT] = 0
    model.save_pretrained(directory)
    file = directory / "generation_config.json"
    advice = {"repetition_penalty": 5.0, "temperature": 0.7, "top_k": 3, "do_sample": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | advice))
    return directory


@pytest.fixture(scope="module")
def teacher(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    options = ("--max-length", str(WINDOW), "--generation", "--drain-seconds", "120", "--label-dtype", "float32")
    served = start(directory, tmp_path_factory.mktemp("vllm-generation"), *options)
    yield served
    stop(served)


@pytest.fixture
def client(teacher: Served) -> Iterator[TeacherClient]:
    with TeacherClient(teacher.address, patience_seconds=1) as client:
        yield client


def greedy(directory: Path, prompt: Prompt, *, tokens: int, stop: int) -> tuple[int, ...]:
    """The likeliest token after token, by transformers' forward pass alone."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    ids = list(prompt.token_ids)
    with torch.inference_mode():
        while len(ids) < len(prompt.token_ids) + tokens and (len(ids) == len(prompt.token_ids) or ids[-1] != stop):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1, :-PADDED_ROWS].argmax()))
    return tuple(ids[len(prompt.token_ids) :])


def test_what_it_writes_is_likeliest_among_tokens_until_one_stops_it(client: TeacherClient, directory: Path) -> None:
    free = {prompt.id: greedy(directory, prompt, tokens=24, stop=-1) for prompt in PROMPTS}
    never = next(token for token in range(3, 290) if not any(token in ids for ids in free.values()))
    options = DecodeOptions(max_new_tokens=24, stop_token_ids=(never,))
    assert {each.id: each.token_ids for each in client.generate(PROMPTS, options)} == free
    stop_token = free["p2"][6]
    for each in client.generate(PROMPTS, DecodeOptions(max_new_tokens=24, stop_token_ids=(stop_token,))):
        ids = free[each.id]
        ends = ids.index(stop_token) + 1 if stop_token in ids else len(ids)
        assert each.token_ids == ids[:ends]
        assert each.finish_reason == ("stop" if stop_token in ids else "length")


def test_it_writes_to_the_end_of_its_window(client: TeacherClient, directory: Path) -> None:
    prompt = Prompt(id="x", token_ids=[5 + place % 200 for place in range(WINDOW - 1)])
    (last,) = client.generate([prompt], DecodeOptions(max_new_tokens=1, stop_token_ids=(0,)))
    assert last.token_ids == greedy(directory, prompt, tokens=1, stop=-1)
    (whole,) = client.generate(
        [Prompt(id="x", token_ids=[7])], DecodeOptions(max_new_tokens=WINDOW - 1, stop_token_ids=(0,))
    )
    assert len(whole.token_ids) == WINDOW - 1 or whole.token_ids[-1] == 0


def test_samples_repeat_with_the_seed_and_follow_the_distribution(client: TeacherClient, directory: Path) -> None:
    vocab_size = AutoModelForCausalLM.from_pretrained(directory).config.vocab_size - PADDED_ROWS

    def samples(prompts: list[Prompt], seed: int) -> dict[str, tuple[int, ...]]:
        options = DecodeOptions(max_new_tokens=16, temperature=0.7, seed=seed, stop_token_ids=(0,))
        return {each.id: each.token_ids for each in client.generate(prompts, options)}

    together = samples(PROMPTS, 5)
    assert max(token for ids in together.values() for token in ids) < vocab_size
    assert samples(PROMPTS[3:4], 5)["p3"] == together["p3"]
    assert samples(PROMPTS, 6) != together
    assert_samples_follow_the_distribution(client, temperature=2.0)


@pytest.mark.parametrize("temperature", [0.005, 2.5])
def test_temperatures_at_which_vllm_does_not_draw_are_refused(client: TeacherClient, temperature: float) -> None:
    with pytest.raises(InvalidInputError, match=r"'p0' failed: vLLM draws at temperatures from 0.01 to 2"):
        list(client.generate(PROMPTS[:1], DecodeOptions(max_new_tokens=2, temperature=temperature)))


def test_text_that_is_no_number_is_refused_and_harms_nobody(client: TeacherClient, directory: Path) -> None:
    spoilt = Prompt(id="spoilt", token_ids=[7, SPOILT, 9])
    options = DecodeOptions(max_new_tokens=12, stop_token_ids=(0,))
    expected = {prompt.id: greedy(directory, prompt, tokens=12, stop=0) for prompt in PROMPTS}
    # More than once: what it computed must not lie in the memory that the next ones get.
    for _ in range(3):
        answered: list[Continuation] = []
        with pytest.raises(TeacherError, match="'spoilt' failed: the teacher's logits are not finite"):
            answered.extend(client.generate([*PROMPTS, spoilt], options))
        assert {each.id: each.token_ids for each in answered} == expected
        assert_scores_beside(client, directory, spoilt)


def assert_scores_beside(client: TeacherClient, directory: Path, spoilt: Prompt) -> None:
    """The labels of others are what transformers computes."""
    sequences = [
        TokenSequence(id=each.id, token_ids=each.token_ids, label_positions=range(1, len(each.token_ids)))
        for each in (spoilt, *PROMPTS)
    ]
    head, scored = client.fetch_lm_head(), []
    with pytest.raises(TeacherError, match="'spoilt' failed: the teacher's logits are not finite"):
        scored.extend(client.score(sequences))
    labels = {each.id: each.labels for each in scored}
    assert set(labels) == {prompt.id for prompt in PROMPTS}
    model = AutoModelForCausalLM.from_pretrained(directory)
    for prompt in PROMPTS:
        with torch.inference_mode():
            expected = model(torch.tensor([list(prompt.token_ids)])).logits[0, :-1, :-PADDED_ROWS].log_softmax(-1)
        found = torch.from_numpy(head.logits(labels[prompt.id].hidden_ND)).log_softmax(-1)
        assert (found - expected)[expected > -10].abs().max() < 1e-3


@pytest.mark.parametrize(
    ("token_ids", "max_new_tokens", "error", "what"),
    [
        ([], 4, InvalidInputError, "has no tokens"),
        ([3, 10**6], 4, InvalidInputError, "holds the token id 1000000"),
        ([3, 330], 4, InvalidInputError, "holds the token id 330"),
        ([3], 0, InvalidInputError, "max_new_tokens is 0"),
        ([3], WINDOW, LimitExceededError, "with 256 new ones that is beyond the teacher's 256"),
        ([3] * WINDOW, 1, LimitExceededError, "has 256 tokens; with 1 new ones"),
        ([3] * (WINDOW + 1), 1, LimitExceededError, "has 257 tokens, more than"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(
    client: TeacherClient, token_ids: list[int], max_new_tokens: int, error: type[SmoothKDError], what: str
) -> None:
    prompts = [PROMPTS[0], Prompt(id="wrong", token_ids=token_ids)]
    with pytest.raises(error, match=what):
        next(client.generate(prompts, DecodeOptions(max_new_tokens=max_new_tokens)))
    assert len(list(client.generate(PROMPTS[:1], DecodeOptions(max_new_tokens=2)))) == 1


def long_request() -> pb.GenerateSequencesRequest:
    """Half a minute of decoding and more."""
    prompts = [pb.GeneratePrompt(id=str(n), token_ids=[n % 290, n // 290, 5]) for n in range(1024)]
    return pb.GenerateSequencesRequest(prompts=prompts, max_new_tokens=WINDOW - 3, stop_token_ids=[0])


def processor_seconds(processes: list[psutil.Process]) -> float:
    return sum(process.cpu_times().user + process.cpu_times().system for process in processes)


def test_a_request_that_is_cancelled_leaves_the_engine_at_rest(teacher: Served) -> None:
    processes = psutil.Process(teacher.process.pid).children(recursive=True)
    with grpc.insecure_channel(teacher.address) as channel:
        stream = TeacherServiceStub(channel).GenerateSequences(long_request())
        next(stream)
        began, spent = time.monotonic(), processor_seconds(processes)
        stream.cancel()

        def rests() -> bool:
            nonlocal began, spent
            if time.monotonic() - began < 1:
                return False
            before, spent = spent, processor_seconds(processes)
            began = time.monotonic()
            return spent - before < 0.2

        wait_until(rests, seconds=12)


def test_what_is_under_way_at_a_ctrl_c_is_written_to_its_end(teacher: Served) -> None:
    """A terminal sends the signal to vLLM's processes as well."""
    processes = psutil.Process(teacher.process.pid).children(recursive=True)
    with grpc.insecure_channel(teacher.address) as channel:
        request = long_request()
        del request.prompts[128:]
        stream = TeacherServiceStub(channel).GenerateSequences(request)
        stream.initial_metadata()
        for process in (psutil.Process(teacher.process.pid), *processes):
            process.send_signal(signal.SIGINT)
        assert len(list(stream)) == 128
    assert teacher.process.wait(60) == 0
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
