"""The page of benchmarks, docs/benchmarks.md: its tables are what the committed JSON says, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.tables import kernels, trainings

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
SECTIONS = {
    "grpo": trainings.grpo,
    "trainers": trainings.trainers,
    "distributed": trainings.distributed,
    "plan": trainings.plan,
    "longest": trainings.longest,
    "linear_logprob": kernels.linear_logprob,
    "lora_fold": kernels.lora_fold,
    "lora": kernels.lora,
    "dequantise": kernels.dequantise,
    "paged_attention": kernels.paged_attention,
    "skinny": kernels.skinny,
    "blocks": kernels.blocks,
    "attention": kernels.attention,
    "packing": kernels.packing,
}


def rendered(page: str) -> str:
    """The page with every marked section as the JSON has it.

    Raises:
        ValueError: A section's markers are missing.
    """
    for name, section in SECTIONS.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if start not in page or end not in page:
            raise ValueError(f"docs/benchmarks.md has no section between '{start}' and '{end}'; put the markers back.")
        before, after = page.split(start)[0], page.split(end)[1]
        page = f"{before}{start}\n{section(RESULTS)}\n{end}{after}"
    return page


def main(arguments: list[str]) -> int:
    """Write the page, or with `--check` say whether it differs."""
    page = PAGE.read_text()
    wanted = rendered(page)
    if "--check" in arguments:
        if page != wanted:
            print("docs/benchmarks.md is not what the JSON says: run python -m benchmarks.tables", file=sys.stderr)
        return int(page != wanted)
    PAGE.write_text(wanted)
    return 0
