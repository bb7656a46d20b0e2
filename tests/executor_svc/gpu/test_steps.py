"""Steps as a GPU runs them, queued ahead and replayed; here kernels are interpreted, and run when they are queued."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from executor_svc.batch import AheadRunner, LayerGroup, SamplingBatch, StepBatch, StepError
from executor_svc.gpu.input_buffer import InputBuffer, StepShape
from executor_svc.gpu.inputs import inputs_of
from executor_svc.gpu.queue import HostQueue
from executor_svc.gpu.steps import DeviceSteps, StepLimits, decode_sizes, shapes_to_record
from executor_svc.gpu.triton_attention import TritonAttention
from executor_svc.kv_cache import PagedPool
from executor_svc.layer_groups import FULL
from executor_svc.pool_geometry import LayerShape, plan_pool
from tests.executor_svc.step_driver import Blocks, DrivenRequest, advance, drive, step_batch
from tests.executor_svc.test_parity import generate, prompts
from tests.parity import assert_same_tokens
from tests.tiny_models import build_model

FUSED = ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "olmo2", "mixtral")
PACKED = ("gpt2", "gpt_oss", "llama4_text", "mimo_v2_flash")
LENGTHS = (21, 6, 1)  # the first is longer than the models' windows
OUTPUT_COUNT = 5


def load(load_runner, architecture, **settings):
    return load_runner(architecture, attention="triton", **({"graphs": False} | settings))


def requests(**sampling) -> list[DrivenRequest]:
    return [DrivenRequest(p, OUTPUT_COUNT, first_step=i, **sampling) for i, p in enumerate(prompts(LENGTHS))]


@pytest.fixture(scope="module")
def llama(load_runner):
    """One that nothing is done to but run steps."""
    return load(load_runner, "llama")


def assert_same(architecture: str, runner) -> None:
    """Every request has the tokens of `generate()`."""
    driven = requests()
    drive(runner, driven, chunk=16)

    model = build_model(architecture)
    for request in driven:
        expected = generate(model, list(request.prompt_ids), OUTPUT_COUNT)
        assert_same_tokens(model, request.prompt_ids, expected, request.output_ids)


@pytest.mark.parametrize("architecture", FUSED)
def test_fused_kernels_give_the_tokens_of_generate(load_runner, architecture):
    """They are another program for the same model: parity with transformers is what makes them right."""
    runner = load(load_runner, architecture)

    assert runner.info.mode == "fused"
    assert_same(architecture, runner)


@pytest.mark.parametrize("architecture", PACKED)
def test_models_of_other_families_give_the_tokens_of_generate(load_runner, architecture):
    """Any model that transformers knows runs on a GPU, with our attention in its own modules."""
    runner = load(load_runner, architecture)

    assert runner.info.mode == "packed"
    assert runner._device_steps is not None
    assert_same(architecture, runner)


def test_a_model_that_reworks_its_keys_is_left_to_torch(load_runner):
    """Its attention does not see what the cache was given, so it cannot read that through block tables."""
    runner = load(load_runner, "deepseek_v3")

    assert runner._device_steps is None
    assert_same("deepseek_v3", runner)


def test_drawn_tokens_are_those_that_any_executor_draws(llama, load_runner):
    """A request that goes on at another executor goes on with the same text."""
    sampling = {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 5}
    here, elsewhere = requests(**sampling), requests(**sampling)

    drive(llama, here)
    drive(load_runner("llama", native=False), elsewhere)

    assert [request.output_ids for request in here] == [request.output_ids for request in elsewhere]


@pytest.mark.parametrize("architecture", ["gemma3_text"])
def test_recorded_steps_are_those_that_are_launched_kernel_by_kernel(load_runner, architecture, monkeypatch):
    """Padding to a recorded shape must reach no row, whatever was in its place in the step before."""
    monkeypatch.setattr("executor_svc.gpu.steps._MIXED_INTERVAL", 24)
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 24}
    recorded = load(load_runner, architecture, graphs=True, **limits)
    launched = load(load_runner, architecture, **limits)
    here, elsewhere = requests(), requests()

    drive(recorded, here)
    drive(launched, elsewhere)

    assert len(recorded._device_steps._recorded) == 4
    assert not launched._device_steps._recorded
    assert [request.output_ids for request in here] == [request.output_ids for request in elsewhere]


def test_a_step_finds_the_tokens_of_the_one_before_on_the_device(llama):
    """The host need not know a token before the next one is computed from it."""
    runner = llama
    told, late = ([DrivenRequest(p, 2) for p in prompts((5, 3, 9))] for _ in range(2))
    drive(runner, told, chunk=16)

    blocks = Blocks(runner, 0)
    for request in late:
        blocks.extend(request, len(request.prompt_ids) + 1)
    first = runner.launch(step_batch(late, [len(r.prompt_ids) for r in late], [True] * 3))
    for request in late:
        request.computed_count, request.output_ids = len(request.prompt_ids), [0]
    second = runner.launch(replace(step_batch(late, [1] * 3, [True] * 3), token_ids=np.array([-1, -2, -3])))

    assert isinstance(runner, AheadRunner)
    assert first.keeps_tokens
    outputs = [first.result().token_ids.tolist(), second.result().token_ids.tolist()]
    assert [list(pair) for pair in zip(*outputs, strict=True)] == [request.output_ids for request in told]


def test_a_row_without_finite_logits_is_named(llama):
    """The others are told apart from it by its slot."""
    runner = llama
    driven = [DrivenRequest(p, 2) for p in prompts((5, 3))]
    blocks = Blocks(runner, 0)
    for request in driven:
        blocks.extend(request, len(request.prompt_ids) + 1)
    runner.run(step_batch(driven, [5, 3], [True, True]))
    for plane in runner._pool.planes:
        plane[driven[1].block_tables[0][0]] = torch.nan
    for request in driven:
        request.computed_count, request.output_ids = len(request.prompt_ids), [7]

    with pytest.raises(StepError, match=r"slots \[1\] have NaN"):
        runner.run(step_batch(driven, [1, 1], [True, True]))


def test_a_prompt_without_its_end_samples_nothing(llama):
    """A step may consist of the first part of one prompt."""
    runner = llama
    request = DrivenRequest(list(range(3, 13)), 1)
    blocks = Blocks(runner, 0)
    blocks.extend(request, 4)

    output = runner.run(step_batch([request], [4], [False]))

    assert output.token_ids.shape == (0,)


def test_times_of_a_step_are_told(llama):
    """Where a step's time goes is what an operator looks at first."""
    runner, request = llama, DrivenRequest([5, 6, 7], 3)
    blocks = Blocks(runner, 0)
    advance(runner, blocks, [request], 8)
    blocks.extend(request, 4)
    output = runner.run(step_batch([request], [1], [True]))

    assert output.forward_s > 0
    assert output.sample_s > 0
    assert output.gap_s > 0


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 64, 65, 200, 256, 1000])
def test_no_decoding_step_is_padded_by_more_than_a_third(most):
    """What is padded is computed: from 8 rows on that must stay a small part."""
    sizes = decode_sizes(most)

    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for rows in range(9, most + 1):
        assert min(size for size in sizes if size >= rows) <= max(rows + 7, rows * 4 / 3)


def test_large_shapes_are_recorded_first():
    """Smaller ones then fit into the memory of those; the other way round each would take its own."""
    shapes = list(shapes_to_record(StepLimits(row_count=64, token_count=1100, entry_count=1)))

    assert [s.token_count for s in shapes if not s.is_decode] == [1024, 768, *range(512, 0, -64)]
    assert [s.token_count for s in shapes if s.is_decode] == [64, 56, 48, 40, 32, 24, 16, 8, 4, 2, 1]


GROUPS = (LayerGroup(4), LayerGroup(6, window=9))


def sampling_of(rows: list[int]) -> SamplingBatch:
    count = len(rows)
    return SamplingBatch(
        row_index=np.array(rows, dtype=np.int64),
        temperature=np.linspace(0, 1, count, dtype=np.float32),
        top_k=np.arange(count),
        top_p=np.linspace(0.1, 1, count, dtype=np.float32),
        min_p=np.linspace(0, 0.5, count, dtype=np.float32),
        seed=np.arange(count, dtype=np.uint64) + np.uint64(2**63),
        choice=np.zeros(count, dtype=np.int64),
        output_index=np.arange(count),
    )


def batch_of(query_lengths: list[int], context_lengths: list[int], samples: list[int]) -> StepBatch:
    draw = np.random.default_rng(len(query_lengths))
    tables = [draw.integers(0, 90, (len(query_lengths), 9), dtype=np.int32) for _ in GROUPS]
    return StepBatch(
        slots=np.arange(len(query_lengths)),
        token_ids=draw.integers(0, 300, sum(query_lengths)),
        query_lengths=np.array(query_lengths),
        context_lengths=np.array(context_lengths),
        block_tables=tuple(tables),
        sampling=sampling_of(samples),
    )


def test_inputs_cross_as_they_are_whatever_crossed_before():
    """Two sets of memory take turns and are longer than most steps: nothing of an earlier step may be left in one."""
    buffer = InputBuffer(6, 40, 200, GROUPS, HostQueue())
    chosen = torch.zeros(6, dtype=torch.int64)
    steps = [
        batch_of([1, 1, 1, 1, 1], [30, 8, 33, 1, 2], [0, 1, 2, 3, 4]),
        batch_of([7, 1, 12], [20, 5, 12], [1, 2]),
        batch_of([1], [17], [0]),
        batch_of([30], [36], []),
    ]
    for batch in steps:
        rows, tokens = len(batch.slots), len(batch.token_ids)
        shape = StepShape(6, 40, 6, is_decode=False)
        buffer.fill(batch, shape)
        inputs = buffer.inputs(shape, chosen)
        expected = inputs_of(
            batch.query_lengths,
            batch.context_lengths,
            batch.block_tables,
            torch.from_numpy(batch.token_ids),
            torch.zeros(0),
            GROUPS,
            torch.device("cpu"),
        )
        for name in ("token_ids", "positions", "rows"):
            assert getattr(inputs, name)[:tokens].equal(getattr(expected, name)), name
        assert inputs.row_starts[: rows + 1].equal(expected.row_starts)
        assert inputs.contexts.tolist() == [*batch.context_lengths.tolist(), *[0] * (6 - rows)]
        assert inputs.row_starts[rows:].eq(tokens).all()
        assert inputs.rows[tokens:].eq(-1).all()
        assert inputs.tables[: len(expected.tables)].equal(expected.tables)
        assert inputs.table_starts[:, :rows].equal(expected.table_starts)
        sampling = buffer.sampling(len(batch.sampling))
        for name in ("temperature", "top_k", "top_p", "min_p"):
            assert getattr(sampling, name).numpy().tolist() == getattr(batch.sampling, name).tolist(), name


class BrokenMoment:
    """A device that fails while it is waited for."""

    def await_on_host(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def await_on_device(self):
        """Nothing follows."""


class Echo:
    """A model whose next token is the one that it was given."""

    attention = TritonAttention(torch.device("cpu"))

    def __init__(self):
        self.compute_count = 0

    def compute(self, inputs, pool):
        self.compute_count += 1
        return torch.nn.functional.one_hot(inputs.token_ids[inputs.sampled], 320).float()


class RefusingQueue(HostQueue):
    """Records nothing."""

    def record(self, work):
        raise RuntimeError("operation not permitted when stream is capturing")


def echo_steps(queue, token_count: int = 8) -> DeviceSteps:
    geometry = plan_pool({0: LayerShape(1, 4, 1, 4)}, {FULL: [0]}, 4)
    pool = PagedPool(geometry, 8, torch.float32, torch.device("cpu"))
    return DeviceSteps(Echo(), pool, StepLimits(4, token_count, 64), queue)


def one_row(token: int) -> StepBatch:
    return replace(batch_of([1], [1], [0]), token_ids=np.array([token]), block_tables=(np.zeros((1, 1), np.int32),))


def test_a_device_that_breaks_is_told_of_by_the_result_and_not_by_the_wait():
    """Whoever only waits for the end of a step must get there; the executor then finds out what still works."""
    steps = echo_steps(HostQueue())
    step = steps.launch(one_row(5))
    step.ended = BrokenMoment()

    step.wait()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        step.result()


def test_results_are_kept_until_they_are_read():
    """Two steps may be on their way when a third one's result is read."""
    steps = echo_steps(HostQueue())
    launched = [steps.launch(one_row(token)) for token in (5, 6, 7)]

    assert [step.result().token_ids.tolist() for step in launched] == [[5], [6], [7]]


class SlowDevice(HostQueue):
    """Works on every step for a minute."""

    def mark(self):
        moment = super().mark()
        moment.seconds_since = lambda earlier: 60.0
        return moment


@pytest.mark.parametrize(("queue", "recorded"), [(HostQueue(), {768, 512}), (SlowDevice(), {512})])
def test_large_steps_are_recorded_where_launching_takes_as_long_as_they_do(monkeypatch, queue, recorded):
    """A small model computes a large step sooner than its kernels are launched; of a large one that is hidden, and
    padding the step would only make it longer.
    """
    monkeypatch.setattr("executor_svc.gpu.steps._MIXED_INTERVAL", 512)
    steps = echo_steps(queue, token_count=800)
    steps.record(lambda phase, share: None)

    assert {shape.token_count for shape in steps._recorded if not shape.is_decode} == recorded


def test_what_cannot_be_recorded_is_launched(load_runner, monkeypatch):
    """A model may do what no graph can hold; it is served all the same, and more slowly."""
    monkeypatch.setattr("executor_svc.gpu.queue.queue_for", RefusingQueue)
    runner = load(load_runner, "llama", graphs=True, max_num_seqs=2, max_num_batched_tokens=24)

    assert not runner._device_steps._recorded
    driven = [DrivenRequest([5, 6, 7], 2)]
    drive(runner, driven)
    assert driven[0].output_ids == generate(build_model("llama"), [5, 6, 7], 2)


@pytest.mark.parametrize("graphs", [True, False])
def test_kernels_that_choose_tokens_are_compiled_before_the_first_request(load_runner, monkeypatch, graphs):
    """Compiling takes seconds: in the first step that draws, every request on the executor would wait for it."""
    drew = []
    monkeypatch.setattr("executor_svc.gpu.steps.sample_rows", lambda *_, draws: drew.append(draws))
    load(load_runner, "llama", graphs=graphs, max_num_seqs=2, max_num_batched_tokens=24)

    assert True in drew
