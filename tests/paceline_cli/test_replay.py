"""`paceline replay`: journals as a scheduler writes them, generated again."""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from executor_svc.fake import next_token
from paceline.v1 import fleet_pb2
from paceline_cli.errors import ExitCode
from paceline_cli.main import app
from scheduler_svc.answers import Answer, Terms
from scheduler_svc.core.request import Request, Sampling, with_choices
from scheduler_svc.journal import records
from scheduler_svc.journal.store import Store
from scheduler_svc.recorder import accepted_record
from scheduler_svc.text_stream import TextStream
from scheduler_svc.tokenizer import Tokenizer
from tests.tiny_models import build_model, save_serving_folder

PROMPT = list(b"Why is the sky blue? ")
SEED = 2**63 + 5
SLIP = ord("#")
GREEDY = Sampling()


@dataclass
class Said:
    """A request, and what its choices said."""

    outputs: list[list[int]]
    request_id: str = "chat-1"
    prompt: list[int] = field(default_factory=lambda: list(PROMPT))
    sampling: Sampling = GREEDY
    stop_token_ids: frozenset[int] = frozenset()
    finish_reason: str | None = "length"  # None: has not ended

    def records(self, number: int) -> Iterator[records.Record]:
        """What a scheduler would have written down."""
        request = Request(
            self.request_id,
            array("I", self.prompt),
            len(self.prompt),
            max_output_count=200,
            sampling=self.sampling,
            stop_token_ids=self.stop_token_ids,
        )
        with_choices(request, len(self.outputs))
        for choice in request.family:
            choice.key = 100 * number + choice.choice
        texts = [TextStream(Tokenizer.bytes()) for _ in request.family]
        answer = Answer(request, texts, Terms(b"", (), 30.0, is_named=True), time.monotonic())
        answer.number = number
        yield accepted_record(answer, "fake")
        for choice, output in zip(request.family, self.outputs, strict=True):
            yield records.Placed(choice.key, "executor-0", 77, 1, 1, 1)
            if self.finish_reason is None:
                yield from (records.Stepped(0.0, "executor-0", 1, [choice.key], [token]) for token in output)
            else:
                yield records.ChoiceEnded(choice.key, array("I", output), self.finish_reason, "")


def what_the_fake_says(count: int, seed: int | None = None, choice: int = 0) -> list[int]:
    """The output of the fake model after `PROMPT`."""
    known = list(PROMPT)
    for index in range(count):
        known.append(next_token(known, seed, index, choice))
    return known[len(PROMPT) :]


def what_was_said_with_slips(count: int, places: Set[int]) -> tuple[list[int], list[tuple[int, int, int]]]:
    """An output in which other tokens came at these places and all else follows from them; and those differences."""
    known, wrong = list(PROMPT), []
    for index in range(count):
        token = next_token(known, None, index)
        if index in places:
            wrong.append((index, SLIP, token))
        known.append(SLIP if index in places else token)
    return known[len(PROMPT) :], wrong


@contextmanager
def journal_of(path: Path, *said: Said, more: tuple[records.Record, ...] = ()) -> Iterator[Path]:
    """A journal that its scheduler still has open."""
    store = Store.open(path / "journal.db", 1 << 24)
    store.write([record for number, one in enumerate(said, start=1) for record in one.records(number)])
    store.write(more)
    yield path / "journal.db"
    store.close()


def replay(path: Path, *said: Said, model: str = "fake", words: tuple[str, ...] = ()) -> Any:
    """Write a journal and replay the first request of it."""
    with journal_of(path, *said) as journal:
        return run(journal, said[0].request_id, "--model", model, *words)


def run(journal: Path, *words: str) -> Any:
    return CliRunner().invoke(app, ["replay", str(journal), *words], prog_name="paceline")


def differences(result: Any) -> list[list[tuple[int, int, int]]]:
    """(index, recorded, replayed) of each difference of each choice."""
    return [
        [(one["index"], one["recorded"]["id"], one["replayed"]["id"]) for one in choice["differences"]]
        for choice in json.loads(result.stdout)["choices"]
    ]


def test_what_was_generated_is_generated_again(tmp_path):
    """The promise that makes an answer explainable: nothing but the request decides it."""
    result = replay(tmp_path, Said([what_the_fake_says(40)]))

    assert result.exit_code == ExitCode.OK, result.output
    assert "all 40 tokens the same" in result.stdout
    assert "greedy" in result.stderr
    assert "executor-0" in result.stderr


def test_one_other_token_is_found_and_the_rest_judged_after_it(tmp_path):
    """After a difference everything would differ, if the replay followed its own tokens."""
    output, wrong = what_was_said_with_slips(40, {17})
    with journal_of(tmp_path, Said([output])) as journal:
        result = run(journal, "chat-1", "--model", "fake", "--json", "--block-size", "4")
        shown = run(journal, "chat-1", "--model", "fake")

    assert result.exit_code == shown.exit_code == ExitCode.FAILED
    assert differences(result) == [wrong]
    assert "1 of 40 tokens differ" in shown.stdout
    assert f"{SLIP} '#'" in shown.stdout
    assert "⟦#⟧" in shown.stdout


@pytest.mark.parametrize("places", [{0}, {39}, {15, 16, 17}, {0, 20, 39}])
def test_every_wrong_token_is_found_wherever_it_stands(tmp_path, places):
    """First, last and neighbours: none hides another, whatever of the cache was kept."""
    output, wrong = what_was_said_with_slips(40, places)
    result = replay(tmp_path, Said([output]), words=("--json",))

    assert len(wrong) == len(places)
    assert differences(result) == [wrong]


def test_seeded_choices_are_replayed_each_with_its_own_noise(tmp_path):
    """What a choice says depends on the seed, on the place and on which choice it is."""
    outputs = [what_the_fake_says(24, SEED, choice) for choice in range(3)]
    sampling = Sampling(temperature=0.7, top_k=5, seed=SEED)
    result = replay(tmp_path, Said(outputs, sampling=sampling))

    assert len({tuple(output) for output in outputs}) == 3
    assert result.exit_code == ExitCode.OK, result.output
    assert "choice 2: all 24 tokens the same" in result.stdout
    assert f"temperature 0.7, top_k 5, seed {SEED}" in result.stderr
    assert "top_p" not in result.stderr


def test_a_difference_is_put_to_its_choice(tmp_path):
    """The others have nothing to do with it."""
    outputs = [what_the_fake_says(9, SEED, choice) for choice in range(3)]
    true_token, outputs[1][8] = outputs[1][8], 1
    result = replay(tmp_path, Said(outputs, sampling=Sampling(temperature=1.0, seed=SEED)), words=("--json",))

    assert differences(result) == [[], [(8, 1, true_token)], []]
    assert json.loads(result.stdout)["same"] is False


def test_a_stop_token_is_the_end_and_part_of_the_answer(tmp_path):
    """It was sampled like every other token."""
    output = what_the_fake_says(12)
    end = next(index for index, token in enumerate(output) if token not in output[:index] and index > 4)
    said = Said([output[: end + 1]], stop_token_ids=frozenset({output[end]}), finish_reason="stop")
    result = replay(tmp_path, said)

    assert result.exit_code == ExitCode.OK, result.output
    assert f"all {end + 1} tokens the same" in result.stdout


def test_a_stop_token_that_came_only_now_is_one_difference(tmp_path):
    """The replay ends there by itself; it must go on all the same."""
    output, wrong = what_was_said_with_slips(12, {5})
    stop = wrong[0][2]
    result = replay(tmp_path, Said([output], stop_token_ids=frozenset({stop})), words=("--json",))

    assert stop not in output
    assert differences(result) == [wrong]


def test_what_is_there_of_a_request_that_still_runs_is_replayed(tmp_path):
    """Nobody has to wait for the end of a strange answer, or to stop the scheduler."""
    running = Said([what_the_fake_says(7), []], finish_reason=None)
    result = replay(tmp_path, running)

    assert result.exit_code == ExitCode.OK, result.output
    assert "choice 0: all 7 tokens the same" in result.stdout
    assert "not ended" in result.stderr


def test_hundreds_of_differences_are_counted_and_not_all_shown(tmp_path):
    """With another model every token differs; a screenful says so."""
    result = replay(tmp_path, Said([[1] * 100]))

    assert "100 of 100 tokens differ" in result.stdout
    assert "80 more" in result.stdout


def test_an_unknown_request_names_those_that_are_there(tmp_path):
    """An id is easily mistyped, and results are not kept for ever."""
    said = [Said([what_the_fake_says(2)], request_id=f"chat-{number}") for number in range(8)]
    with journal_of(tmp_path, *said) as journal:
        result = run(journal, "chat-77", "--model", "fake")

    assert result.exit_code == ExitCode.USAGE
    assert "no request 'chat-77'" in result.stderr
    assert "latest there: 'chat-7', 'chat-6', 'chat-5', 'chat-4', 'chat-3'" in result.stderr
    assert "'chat-2'" not in result.stderr
    assert "--keep-results" in result.stderr


def test_a_request_without_output_says_so(tmp_path):
    """Nothing to compare is not the same as nothing different."""
    result = replay(tmp_path, Said([[]], finish_reason=None))

    assert result.exit_code == ExitCode.USAGE
    assert "has no output" in result.stderr


def test_a_journal_that_is_none_is_wrong_usage(tmp_path):
    """Exit code 1 says that tokens differ, and must say nothing else."""
    (tmp_path / "letter.txt").write_text("Dear reader, " * 100)

    missing, other = (run(tmp_path / name, "r", "--model", "fake") for name in ("nothing.db", "letter.txt"))
    assert missing.exit_code == other.exit_code == ExitCode.USAGE
    assert "there is no such file" in missing.stderr
    assert "it is not an SQLite database" in other.stderr


@pytest.mark.parametrize(
    ("said", "words", "reason"),
    [
        (Said([[5012]]), (), "the vocabulary of 'fake' ends at 256"),
        (Said([[1] * 60]), ("--max-model-len", "64"), "raise --max-model-len"),
        (Said([[1]]), ("--block-size", "24"), "power of two, got 24"),
    ],
)
def test_a_model_or_setting_that_cannot_be_is_refused(tmp_path, said, words, reason):
    """A table of nonsense would look like an answer."""
    result = replay(tmp_path, said, words=words)

    assert result.exit_code == ExitCode.USAGE
    assert reason in result.stderr


def test_another_folder_or_type_than_it_ran_with_is_pointed_out(tmp_path):
    """Then a difference says little. The executor that had the request is known as long as it has not left."""
    model = fleet_pb2.ExecutorModel(name="llama", fingerprint="0123456789abcdef", dtype="bfloat16")
    joined = fleet_pb2.JoinRequest(executor_id="executor-0", incarnation=77, model=model)
    more = (records.Joined("executor-0", joined.SerializeToString()),)
    with journal_of(tmp_path, Said([what_the_fake_says(3)]), more=more) as journal:
        shown = run(journal, "chat-1", "--model", "fake")
        result = run(journal, "chat-1", "--model", "fake", "--json")

    assert shown.exit_code == ExitCode.OK
    assert "with llama, bfloat16" in shown.stderr
    assert "another serving folder (0123456789ab, here fake)" in shown.stderr
    assert json.loads(result.stdout)["choices"][0]["executor_dtype"] == "bfloat16"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """The serving folder of a tiny model."""
    return save_serving_folder("llama", tmp_path_factory.mktemp("llama"))


def generated(prompt: list[int], count: int) -> list[int]:
    """What transformers says."""
    model = build_model("llama")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return output[0, len(prompt) :].tolist()


SMALL = ("--device", "cpu", "--dtype", "float32", "--threads", "1", "--cache-memory", "4MiB", "--block-size", "4")


def test_a_model_gives_what_transformers_has_given(tmp_path, llama):
    """The replay runs what serves, so it explains what was served."""
    result = replay(tmp_path, Said([generated(PROMPT, 20)]), model=str(llama), words=SMALL)

    assert result.exit_code == ExitCode.OK, result.output
    assert "all 20 tokens the same" in result.stdout
    assert "llama, float32" in result.stderr


def test_a_model_is_asked_anew_after_a_token_that_it_would_not_have_said(tmp_path, llama):
    """Teacher-forced: each position is what the model says after the recorded tokens, not after its own."""
    output = generated(PROMPT, 12)
    output = [*output[:5], SLIP, *generated([*PROMPT, *output[:5], SLIP], 6)]
    result = replay(tmp_path, Said([output]), model=str(llama), words=(*SMALL, "--json"))

    assert differences(result) == [[(5, SLIP, generated(PROMPT, 6)[5])]]
