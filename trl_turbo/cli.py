"""The `trl-turbo` command."""

from __future__ import annotations

import contextlib
import importlib
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    help="One line in a TRL script, and it trains with a fraction of the memory.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trl-turbo {version('trl-turbo')}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """One line in a TRL script, and it trains with a fraction of the memory."""


@app.command(
    epilog="**Examples**: `trl-turbo demo` · `trl-turbo demo --steps 400 --out /tmp/demo` · `trl-turbo demo --stock`"
)
def demo(
    steps: Annotated[int, typer.Option(min=6, help="GRPO steps.")] = 250,
    out: Annotated[Path, typer.Option(help="Folder for the model, the logs and the curve.")] = Path("trl-turbo-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the weights, the sums and the sampling.")] = 0,
    stock: Annotated[bool, typer.Option("--stock", help="Train without patch().")] = False,
    compare: Annotated[bool, typer.Option(help="Measure stock against patched as well.")] = True,
) -> None:
    """Train a small model with an unmodified GRPO script, and watch its reward rise.

    Needs no GPU and no network, and takes some minutes. Ends with an error if the reward did not rise.
    """
    from trl_turbo.demo.run import Options, run

    # Wide enough for the report's table where the output is a file.
    console = Console() if Console().is_terminal else Console(width=120)
    options = Options(out=out.resolve(), steps=steps, seed=seed, stock=stock, compare=compare)
    if not run(options, console):
        raise typer.Exit(1)


@app.command(epilog="**Examples**: `trl-turbo report` · `trl-turbo report --json`")
def report(
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
) -> None:
    """Print what patch() does with the TRL that is installed here."""
    import trl_turbo

    for row in trl_turbo.patch(verbose=False).by_status("pending"):
        # A trainer that cannot be imported here, for want of a package, stays pending in the table.
        with contextlib.suppress(ImportError):
            importlib.import_module(row.target)
    found = trl_turbo.status()
    typer.echo(found.to_json() if as_json else str(found))


def main() -> None:
    """Entry point of the console script."""
    app()
