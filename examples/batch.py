"""Generate for many prompts at once: `python examples/batch.py [COUNT] [ADDRESS]`; or set $PACELINE_SERVER."""

import os
import sys
import time

from paceline import Client, PacelineError

ANIMALS = ("ant", "bear", "crow", "dolphin", "eagle", "fox", "goat", "heron")


def main() -> None:
    """Send everything over one stream; the server decides what runs together."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    address = sys.argv[2] if len(sys.argv) > 2 else os.environ.get("PACELINE_SERVER", "localhost:50051")
    prompts = [f"Story {index}. Once upon a time a {ANIMALS[index % len(ANIMALS)]}" for index in range(count)]

    begun = time.perf_counter()
    with Client(address) as client:
        outputs = client.generate_batch(prompts, max_output_tokens=64, on_progress=print_progress)
    elapsed = time.perf_counter() - begun

    token_count = sum(output.usage.output_token_count for output in outputs)
    print(f"\n{token_count} tokens in {elapsed:.2f} s: {token_count / elapsed:.0f} tokens/s")


def print_progress(done: int, total: int) -> None:
    """Keep one line up to date."""
    print(f"\r{done} of {total}", end="", flush=True)


if __name__ == "__main__":
    try:
        main()
    except PacelineError as error:
        sys.exit(f"{error}\n{error.what_to_do}")
