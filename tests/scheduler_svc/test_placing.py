"""Choices, prefix reuse and policies as users meet them: over gRPC, on executors with the fake model."""

import asyncio
import time
from array import array
from dataclasses import replace

import grpc
import pytest

from paceline import AsyncClient
from paceline.v1 import fleet_pb2, inference_pb2
from tests.scheduler_svc.test_service import SLOW, expected_text, status_of
from tests.system import FAST, request, started, until

LONG = "a beginning that many requests share, "  # nine blocks of four tokens, and two more tokens


async def executors_of(system):
    return (await system.fleet.ListExecutors(fleet_pb2.ListExecutorsRequest())).executors


async def test_each_choice_has_its_own_pieces_and_its_own_end():
    """Pieces come in any order; a client puts them together by their number, and the usage closes the answer."""
    async with started() as system:
        messages = [m async for m in system.generate(request("hello", 12, choice_count=3, temperature=1.0, seed=5))]
        await system.idle()

    first, *chunks = messages
    assert first.prompt_token_count == 5
    texts = ["".join(chunk.text for chunk in chunks if chunk.choice == choice) for choice in range(3)]
    assert [len(text) for text in texts] == [12, 12, 12]
    assert len(set(texts)) == 3
    ends = [chunk.choice for chunk in chunks if chunk.finish_reason == inference_pb2.FINISH_REASON_LENGTH]
    assert sorted(ends) == [0, 1, 2]
    assert [chunk.HasField("usage") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage.output_token_count == 36
    for choice in range(3):
        counts = [chunk.output_token_count for chunk in chunks if chunk.choice == choice]
        assert counts == sorted(counts)
        assert counts[-1] == 12


async def test_a_stop_string_ends_only_the_choice_that_says_it():
    """Four people answer; that one is done does not silence the others."""
    async with started() as system, AsyncClient(system.address) as client:
        options = {"n": 4, "temperature": 1.0, "seed": 11, "stream": False}
        free = await client.generate("hello", max_output_tokens=20, **options)
        stop = free.choices[2].text[8:11]
        stopped = await client.generate("hello", max_output_tokens=20, stop=stop, **options)
        await system.idle()

    for one, other in zip(free.choices, stopped.choices, strict=True):
        assert other.text == one.text.partition(stop)[0]
    assert stopped.choices[2].finish_reason == "stop"
    assert [choice.finish_reason for choice in stopped.choices].count("length") >= 2


async def test_more_choices_than_slots_all_come_in_the_end():
    """A user asks for eight; the executor has room for three at a time."""
    async with started(1, replace(FAST, max_num_seqs=3)) as system, AsyncClient(system.address) as client:
        output = await client.generate("hello", max_output_tokens=10, n=8, stream=False)
        await system.idle()

    assert [choice.text for choice in output.choices] == [expected_text("hello", 10)] * 8  # greedy: all alike


async def test_cancelling_a_request_ends_all_of_its_choices():
    """Nobody reads them any more; their blocks are wanted."""
    async with started(1, SLOW) as system:
        call = system.generate(request("hello", 200, choice_count=4, request_id="r"))
        await call.read()
        await call.read()
        await system.inference.Cancel(inference_pb2.CancelRequest(request_id="r"))
        error = await status_of(call)
        await system.idle()

    assert error.code() is grpc.StatusCode.CANCELLED


async def test_the_deadline_delivers_what_every_choice_has():
    """What was generated in time was paid for; the status comes after it."""
    async with started(1, SLOW) as system:
        counts = {}

        async def read():
            async for message in system.generate(request("hello", 200, choice_count=3), timeout=0.6):
                if message.token_ids:
                    counts[message.choice] = message.output_token_count

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read()
        await system.idle()

    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(counts) == 3
    assert min(counts.values()) > 3


async def test_a_batch_may_ask_for_several_choices():
    """Offline work samples most; its answers come whole, all choices together."""
    async with started() as system, AsyncClient(system.address) as client:
        outputs = await client.generate_batch(["hello", {"prompt": "bye", "n": 1}], max_output_tokens=6, n=3)
        await system.idle()

    assert [len(output.choices) for output in outputs] == [3, 1]
    assert {choice.text for choice in outputs[0].choices} == {expected_text("hello", 6)}
    assert outputs[0].usage.output_token_count == 18


async def test_the_answer_says_how_much_of_the_prompt_was_in_the_cache():
    """Users pay for prompts; they want to see what the second one with the same beginning cost."""
    async with started() as system, AsyncClient(system.address) as client:
        first = await client.generate(LONG + "first", max_output_tokens=5, stream=False)
        second = await client.generate(LONG + "second", max_output_tokens=5, stream=False)
        (executor,) = await executors_of(system)

    assert first.usage.cached_prompt_token_count == 0
    assert second.usage.cached_prompt_token_count == len(LONG) // 4 * 4
    assert second.text == expected_text(LONG + "second", 5)
    assert executor.reused_token_count == second.usage.cached_prompt_token_count
    assert executor.known_token_count == 2 * len(LONG) + 5 + 6
    assert 0 < executor.reusable_block_count < executor.free_block_count == 64


async def test_the_next_turn_of_a_conversation_finds_the_last_answer_in_the_cache():
    """A chat sends everything said so far again; only the new question should cost anything."""
    async with started() as system, AsyncClient(system.address) as client:
        prompt = LONG + "question?"
        answer = await client.generate(prompt, max_output_tokens=20, stream=False)
        following = await client.generate(prompt + answer.text + " And?", max_output_tokens=5, stream=False)

    assert following.usage.cached_prompt_token_count == (len(prompt) + 19) // 4 * 4


async def test_salts_keep_tenants_apart():
    """Whoever times an answer could learn whether somebody else has asked the same; only equal salts share."""
    async with started() as system:
        async with AsyncClient(system.address, cache_salt="mine") as mine, AsyncClient(system.address) as nobody:
            outputs = [await mine.generate(LONG, stream=False, max_output_tokens=2) for _ in range(2)]
            others = [
                await nobody.generate(LONG, stream=False, max_output_tokens=2, cache_salt=salt)
                for salt in ("yours", "")
            ]

    cached = [output.usage.cached_prompt_token_count for output in (*outputs, *others)]
    assert cached == [0, (len(LONG) - 1) // 4 * 4, 0, 0]
    assert {output.text for output in (*outputs, *others)} == {expected_text(LONG, 2)}


async def test_reuse_can_be_switched_off():
    """An operator who may not keep anything of a request after its end needs a switch that does it."""
    async with started(prefix_reuse=False) as system, AsyncClient(system.address) as client:
        outputs = [await client.generate(LONG, stream=False, max_output_tokens=3) for _ in range(2)]
        (executor,) = await executors_of(system)

    assert [output.usage.cached_prompt_token_count for output in outputs] == [0, 0]
    assert executor.reusable_block_count == 0


async def test_requests_go_where_their_beginning_is():
    """Two executors, two long beginnings: after the first answers, each request costs only its own question."""
    beginnings = [letter * 60 for letter in "xy"]
    async with started(2, replace(FAST, fake_token_us=1000)) as system, AsyncClient(system.address) as client:
        await asyncio.gather(*(client.generate(b, stream=False, max_output_tokens=8) for b in beginnings))
        outputs = []
        for number in range(6):
            prompt = beginnings[number % 2] + f"{number}: a question"
            outputs.append(await client.generate(prompt, stream=False, max_output_tokens=2))
        executors = await executors_of(system)

    assert [output.usage.cached_prompt_token_count for output in outputs] == [60] * 6
    assert [executor.reused_token_count for executor in executors] == [180, 180]


async def test_a_more_urgent_request_takes_a_slot_from_one_that_runs():
    """Somebody waits for this one; the other is a background job that nobody looks at."""
    slow = replace(FAST, max_num_seqs=1, fake_step_us=10_000)
    async with started(1, slow, policy="priority") as system, AsyncClient(system.address) as client:
        background = asyncio.create_task(client.generate("background", max_output_tokens=150, stream=False))
        await until(lambda: system.scheduler.request_count == 1)
        began = time.monotonic()
        urgent = await client.generate("urgent", max_output_tokens=3, priority=10, stream=False)
        took = time.monotonic() - began
        late = await background

    assert urgent.text == expected_text("urgent", 3)
    assert took < 1.0
    assert late.text == expected_text("background", 150)
    assert late.usage.recomputation_count == 1


async def test_a_request_that_cannot_make_its_deadline_is_told_so_early():
    """Thirty seconds of prompt and twenty seconds of patience: the answer is no, now."""
    slow = replace(FAST, fake_step_us=1000, fake_token_us=2000, fake_block_count=8192, max_num_batched_tokens=64)
    async with started(1, slow, policy="deadline") as system, AsyncClient(system.address) as client:
        for number in range(3):
            await client.generate(f"{number}" * 400, max_output_tokens=12, stream=False)  # it learns its own speed
        began = time.monotonic()
        prompt = array("I", [65] * 8000)
        call = system.generate(request(token_ids={"ids": prompt.tobytes()}, max_output_tokens=2), timeout=5)
        error = await status_of(call)
        took = time.monotonic() - began
        await system.idle()

    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (
        "s before its deadline: the 8000 tokens before its next one cannot be computed in that time" in error.details()
    )
    assert took < 2.0


async def test_tenants_share_an_executor_though_one_asks_for_more():
    """A tenant with forty requests in the queue must not make another, with four, wait for all of them."""
    slow = replace(FAST, max_num_seqs=2, fake_step_us=10_000)
    order = []
    async with started(1, slow, policy="fair") as system, AsyncClient(system.address) as client:

        async def ask(tenant):
            await client.generate("the same question", max_output_tokens=6, tenant=tenant, stream=False)
            order.append(tenant)

        greedy = [asyncio.create_task(ask("greedy")) for _ in range(24)]
        await until(lambda: system.scheduler.waiting_count >= 18)
        await asyncio.gather(*(ask("modest") for _ in range(4)))
        await asyncio.gather(*greedy)

    assert max(index for index, tenant in enumerate(order) if tenant == "modest") < 14
