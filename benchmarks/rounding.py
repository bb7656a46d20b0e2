"""What rounding costs in quality: bfloat16, and int8 weights, against the model in float32, all in C++ on this CPU.

Every token of a text is predicted from those before it in its piece of 512, and compared with float32 at its place: so
a difference does not grow from one token to the next.

    python benchmarks/rounding.py FOLDER                  # a serving folder; the text is this repository's documents
    python benchmarks/rounding.py FOLDER --text book.txt
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from executor_svc.attention.torch_backend import TorchAttention
from executor_svc.kv_cache import PagedPool
from executor_svc.machine import usable_core_count
from executor_svc.model import choose_dtype, load_model, open_folder
from executor_svc.self_test import StepModel
from scheduler_svc.tokenizer import Tokenizer

PIECE, BLOCK_SIZE = 512, 16
CPU = torch.device("cpu")
DOCUMENTS = Path(__file__).parent.parent


def pieces_of(folder: str, text: str, count: int) -> list[torch.Tensor]:
    """The first pieces of a text, whole ones only, `[PIECE]` each."""
    ids = torch.tensor(Tokenizer.from_folder(open_folder(folder)).encode(text))
    return [piece for piece in ids.split(PIECE) if len(piece) == PIECE][:count]


def logits_of(steps: StepModel, pieces: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Of every token of each piece, `[PIECE, vocabulary]`; the next piece overwrites them."""
    pool = PagedPool(steps.traits.geometry(BLOCK_SIZE), PIECE, steps.traits.cache_dtype, CPU)
    tables = [np.arange(-(-PIECE // group.block_size), dtype=np.int32)[None] for group in pool.geometry.groups]
    whole = np.array([PIECE])
    with torch.inference_mode():
        for piece in pieces:
            yield steps.step(whole, whole, tables, piece, pool, torch.arange(PIECE))


def compare(folder: str, pieces: list[torch.Tensor]) -> Table:
    """A row for each kind; the first is what the others are compared with."""
    table = Table("weights and steps", "perplexity", "logits: mean difference", "of their spread", "same next token")
    types = dict.fromkeys((torch.float32, choose_dtype("auto", CPU)))
    kinds = [
        load_model(folder, CPU, dtype, TorchAttention(), 0, usable_core_count(), weights=weights)
        for weights in ("", "int8")
        for dtype in types
    ]
    sums = {kind.type_name: torch.zeros(4, dtype=torch.float64) for kind in kinds}
    for piece, *computed in zip(pieces, *(logits_of(kind.steps, pieces) for kind in kinds), strict=True):
        exact = computed[0]
        spread = exact.std(dim=-1)
        for kind, logits in zip(kinds, computed, strict=True):
            loss = torch.nn.functional.cross_entropy(logits[:-1], piece[1:])
            difference = (logits - exact).abs().mean(-1)
            same = (logits.argmax(-1) == exact.argmax(-1)).float()
            means = [loss, difference.mean(), (difference / spread).mean(), same.mean()]
            sums[kind.type_name] += torch.tensor(means, dtype=torch.float64) / len(pieces)
    for name, (loss, difference, share, same) in ((name, means.tolist()) for name, means in sums.items()):
        table.add_row(name, f"{np.exp(loss):.2f}", f"{difference:.3f}", f"{share:.1%}", f"{same:.1%}")
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a serving folder", metavar="FOLDER")
    parser.add_argument("--text", type=Path, nargs="*", help="files of text", metavar="FILE")
    parser.add_argument("--pieces", type=int, default=16, help="so many times 512 tokens", metavar="N")
    arguments = parser.parse_args()
    files = arguments.text or [DOCUMENTS / "README.md", *sorted((DOCUMENTS / "docs").glob("*.md"))]
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    pieces = pieces_of(arguments.folder, text, arguments.pieces)
    Console().print(compare(arguments.folder, pieces), f"{len(pieces)} pieces of {PIECE} tokens")


if __name__ == "__main__":
    main()
