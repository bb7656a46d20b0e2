"""docs/gpu.md: its figures follow from its formulas, and what it names is there."""

import re
from pathlib import Path

import click
import pytest

from tests.deploy.test_compose import ROOT, command

PAGE = (ROOT / "docs/gpu.md").read_text()

WEIGHTS = 8.03e9 * 2
WEIGHTS_READ = (8.03e9 - 128_256 * 4096) * 2  # without the embedding that tokens are looked up in
TOKEN = 32 * 8 * (128 + 128) * 2
STEP = 1.5e9
MEMORY_GB = {"L4": 24, "RTX 4090": 24, "L40S": 48, "A100 80 GB SXM": 80, "H100 SXM": 80, "H200 SXM": 141}


def rows(first_column: str) -> list[list[str]]:
    """The cells of the table whose header begins so."""
    _, _, rest = PAGE.partition(f"\n| {first_column} |")
    lines = rest.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().replace(",", "") for cell in line.strip("|").split("|")] for line in lines]


def names_of(option: click.Parameter) -> list[str]:
    """What a flag is called, and what switches it off."""
    return [*option.opts, *option.secondary_opts]


def fitting(memory_gb: float) -> int:
    """Tokens whose keys and values fit beside the weights."""
    return round((0.9 * memory_gb * 1e9 - WEIGHTS - STEP) / TOKEN)


def test_tokens_that_fit_are_what_the_formula_gives():
    """Whoever buys a GPU by this table has to be able to check it."""
    table = rows("memory, GB")

    assert [int(row[2]) for row in table] == [fitting(float(row[0])) for row in table]
    assert [int(row[3]) for row in table] == [fitting(float(row[0])) // 2048 for row in table]


def test_bounds_of_decoding_are_what_the_formula_gives():
    """Where that many requests of 1,024 tokens do not fit there is no figure."""
    for name, bandwidth, *bounds in rows("GPU | bandwidth, GB/s"):
        for count, bound in zip((1, 16, 64, 256), bounds, strict=True):
            fits = count * 1024 <= fitting(MEMORY_GB[name])
            expected = count * float(bandwidth) * 1e9 / (WEIGHTS_READ + count * 1024 * TOKEN)
            assert bound == (str(round(expected)) if fits else ""), (name, count)


def test_bounds_of_prompts_are_what_the_formula_gives():
    """The last column is where `--max-num-batched-tokens` comes from."""
    for name, tera, per_second, in_50_ms in rows("GPU | bfloat16, tera-operations a second"):
        rate = float(tera) * 1e12 / WEIGHTS_READ
        assert (int(per_second), int(in_50_ms)) == (round(rate), round(0.05 * rate)), name


def test_the_page_names_flags_and_metrics_that_there_are():
    """A renamed flag or metric is looked for here first."""
    known = {word for verb in ("serve", "executor") for option in command(verb).params for word in names_of(option)}
    source = "".join(
        path.read_text() for folder in ("executor_svc", "scheduler_svc") for path in (ROOT / folder).rglob("*.py")
    )

    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE)) <= known | {"--query-gpu", "--format"}
    for name in set(re.findall(r"\bpaceline_\w+", PAGE)):
        assert name.removesuffix("_total") in source, name


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_links_of_pages_lead_somewhere(page: Path):
    """A heading that was renamed leaves a link that leads to the top of a long page."""
    for target, _, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#([^)\s]*))?\)", page.read_text()):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                anchor
            )
