"""What mkdocs needs to show pages that GitHub shows as well: the pictures of benchmarks, which lie outside `docs/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures to the site."""
    for path in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:  # noqa: ARG001
    """Point at them where the site has them."""
    return markdown.replace("](../benchmarks/results/", "](results/")
