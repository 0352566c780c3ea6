"""What mkdocs needs to show pages that GitHub shows as well: the pictures of benchmarks, which lie outside `docs/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures to the site."""
    for path in sorted(RESULTS.glob("*.png")):
        files.append(File(path.name, str(RESULTS), f"{config['site_dir']}/results", False))
        files.get_file_from_path(path.name).dest_uri = f"results/{path.name}"
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Point at them where the site has them."""
    return markdown.replace("](../benchmarks/results/", "](")
