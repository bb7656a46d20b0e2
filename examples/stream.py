"""Stream one answer, word by word.

    python examples/stream.py "Why is the sky blue?" [ADDRESS]

The server's address is the second argument, or $PACELINE_SERVER, or localhost:50051.
"""

import os
import sys

from paceline import Client, PacelineError


def main() -> None:
    """Ask, print the answer as it comes, then say what it used."""
    question = sys.argv[1] if len(sys.argv) > 1 else "In two sentences: why is the sky blue?"
    address = sys.argv[2] if len(sys.argv) > 2 else os.environ.get("PACELINE_SERVER", "localhost:50051")

    with Client(address) as client, client.chat(question, max_output_tokens=200) as stream:
        for chunk in stream:
            print(chunk.text, end="", flush=True)

    usage = stream.output.usage
    print(f"\n\n{usage.prompt_token_count} + {usage.output_token_count} tokens", end=", ")
    print(f"the first after {usage.first_token_us / 1000:.0f} ms, all after {usage.total_us / 1000:.0f} ms")


if __name__ == "__main__":
    try:
        main()
    except PacelineError as error:
        sys.exit(f"{error}\n{error.what_to_do}")
