"""Takes the pictures of a running service that the documents show: `make pictures`, two and a half minutes.

A scheduler and three executors without a model, an autoscaler that only says what it wants, users who come in waves,
and an executor that is killed while it has a request. What `paceline top`, `paceline trace` and the status page then
show goes into top.svg, trace.svg and status_page.png.
"""

import asyncio
import io
import itertools
import math
import random
import socket
import tempfile
import time
from pathlib import Path

from playwright.async_api import async_playwright
from rich.console import Console
from rich.text import Text

from paceline import AsyncClient, Cancelled
from paceline_cli.sight.scheduler import observed
from paceline_cli.sight.spans import tree_of
from paceline_cli.sight.top_view import Look, picture
from paceline_cli.sight.trace_view import waterfall
from tests.browser.chromium import FROM_VENV
from tests.end_to_end.processes import Services, until

HERE = Path(__file__).parent
EXECUTORS = ("executor-0", "executor-1", "executor-2")
WORDS = "--fake-step-us 18000 --fake-token-us 20 --fake-block-count 640 --max-num-seqs 6 --max-num-batched-tokens 512"
SCALING = """
executors: {min: 1, max: 5}
targets: {first_token: 1s, per_token: 100ms}
actuator: {kind: keda}
keda: {listen: "127.0.0.1:0"}
"""
WAVES_S = 120  # how long users come before the pictures are taken
TOP_SIZE = (120, 40)
PAGE_SIZE = {"width": 1280, "height": 1000}

SHARED = "You help people to find what they look for. " * 20
KINDS = (  # tenant, how a prompt begins and how it goes on, most tokens of output
    ("search", SHARED, "Where is the", 120),
    ("search", SHARED, "And what of the", 400),
    ("batch", "Summarize what follows. ", "and so on, " * 220, 60),
    ("chat", "", "Hello, this is the", 900),
)


class Users:
    """Ask until they are told to stop; some lose interest in the middle of an answer."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._dice = random.Random(7)
        self._asking: set[asyncio.Task[None]] = set()

    async def come(self) -> None:
        """More and fewer of them, in waves of half a minute."""
        begun = time.monotonic()
        for number in itertools.count():
            busy = 0.5 + 0.5 * math.sin(2 * math.pi * (time.monotonic() - begun) / 30)
            await asyncio.sleep(self._dice.expovariate(0.5 + 3 * busy))
            asking = asyncio.create_task(self._ask(number))
            self._asking.add(asking)
            asking.add_done_callback(self._asking.discard)

    async def _ask(self, number: int) -> None:
        tenant, beginning, rest, token_count = self._dice.choice(KINDS)
        prompt = f"{beginning}{number} {rest} {number}th."
        patience = 100 if self._dice.random() < 0.1 else math.inf
        try:
            async with self._client.generate(
                prompt, max_output_tokens=token_count, tenant=tenant, timeout_s=60
            ) as stream:
                async for _ in stream:
                    if len(stream.text) > patience:
                        break
        except Cancelled:  # the pictures are taken
            return


async def lose_an_executor(services: Services, client: AsyncClient) -> str:
    """Let a request lose its executor in the middle of its answer; returns its id once it has ended."""
    prompt = "Tell me a long story. " * 110
    stream = client.generate(prompt, max_output_tokens=260, tenant="search", request_id="story-2907")
    while len(stream.text) < 120:
        await anext(stream)
    with observed(services.address) as scheduler:
        requests = await asyncio.to_thread(lambda: scheduler.overview(100).requests)
    (place,) = [one.phases[-1].executor_id for one in requests if one.request_id == stream.request_id]
    (process,) = [one for one in services.processes if place in one.words and not one.has_ended]
    process.kill()
    await stream.result()
    await services.is_ready(place, services.again(process))
    return stream.request_id


def save(lines: list[Text], width: int, name: str) -> None:
    """Write what a terminal shows as a picture."""
    console = Console(record=True, width=width, file=io.StringIO(), color_system="truecolor")
    for line in lines:
        console.print(line, no_wrap=True, overflow="crop")
    console.save_svg(str(HERE / f"{name.replace('paceline ', '')}.svg"), title=name)


async def save_page(url: str) -> None:
    """Write what a browser shows as a picture."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=FROM_VENV)
        page = await browser.new_page(viewport=PAGE_SIZE)
        await page.goto(url)
        await page.locator("#executors canvas").nth(len(EXECUTORS) - 1).wait_for()
        await page.wait_for_timeout(1500)
        await page.screenshot(path=HERE / "status_page.png")
        await browser.close()


async def take(services: Services, port: int, request_id: str) -> None:
    """All pictures of now."""
    await services.drain(EXECUTORS[-1], finish_within_s=60)
    with observed(services.address) as scheduler:
        overview, trace = await asyncio.to_thread(lambda: (scheduler.overview(50), scheduler.trace(request_id)))
    width, height = TOP_SIZE
    save(picture(overview, Look(width=width, height=height, has_keys=True)), width, "paceline top")
    save(waterfall(request_id, tree_of(trace), 110), 110, "paceline trace")
    await save_page(f"http://127.0.0.1:{port}/")


async def main() -> None:
    """Start it all, wait, and take the pictures."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        services = Services(Path(folder))
        scaling = Path(folder, "scaling.yaml")
        await asyncio.to_thread(scaling.write_text, SCALING)
        try:
            await services.scheduler("--http-port", str(port), "--policy", "fair", journal=True)
            for name in EXECUTORS:
                await services.executor(name, *WORDS.split())
            services.command("autoscaler", "run", str(scaling), "--scheduler", services.address)
            async with AsyncClient(services.address) as client:
                coming = asyncio.create_task(Users(client).come())
                await asyncio.sleep(WAVES_S)
                request_id = await lose_an_executor(services, client)
                await asyncio.sleep(2)
                with observed(services.address) as scheduler:

                    async def is_busy() -> bool:
                        load = (await asyncio.to_thread(scheduler.overview, 1)).load
                        return load.waiting_request_count > 2

                    await until(is_busy, "nobody waits: the waves are too low")
                await take(services, port, request_id)
                coming.cancel()
        finally:
            services.kill_all()
            await services.close()


if __name__ == "__main__":
    asyncio.run(main())
