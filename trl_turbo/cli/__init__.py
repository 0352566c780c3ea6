"""The `trl-turbo` command."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    help="One line in a TRL script, and it trains with a fraction of the memory.",
    no_args_is_help=True,
    # A traceback of rich over that of a user's script would bury it
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trl-turbo {version('trl-turbo')}")
        raise typer.Exit


def _console() -> Console:
    # Wide enough for the report's table where the output is a file
    return Console() if Console().is_terminal else Console(width=120)


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
    from trl_turbo.demo import run as running
    from trl_turbo.demo.run import Options

    options = Options(out=out.resolve(), steps=steps, seed=seed, stock=stock, compare=compare)
    if not running.run(options, _console()):
        raise typer.Exit(1)


@app.command(
    epilog="**Examples**: `trl-turbo doctor` · `trl-turbo doctor --json` · `trl-turbo doctor && python train.py`"
)
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False) -> None:
    """Say what is installed, what is patched and why not, what this machine leaves unused, and what to install.

    The exit code is 0 where everything that can be patched is; what is off by default, or by a switch, can be.
    """
    from trl_turbo.cli.diagnosis import diagnose, show

    found = diagnose()
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        show(found, _console())
    if found.problems:
        raise typer.Exit(1)


@app.command(
    context_settings={"allow_extra_args": True, "allow_interspersed_args": False, "ignore_unknown_options": True},
    options_metavar="[OPTIONS] SCRIPT [ARGUMENTS]...",
    epilog="**Examples**: `trl-turbo run train.py --lr 1e-5` · `trl-turbo run --plan --no-logprob train.py` · "
    "`trl-turbo run --rollout --rollout-adapter=served train.py` · `accelerate launch -m trl_turbo.cli run train.py`",
)
def run(
    context: typer.Context,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Print what is patched, and for each trainer where its memory goes, before it trains."
        ),
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where a patch is skipped or fails.")] = False,
) -> None:
    """Patch TRL, then run a script as `python` would: `trl-turbo run [OPTIONS] SCRIPT [ARGUMENTS]`.

    Each feature is an option: `--rollout`, `--no-logprob`; each setting takes a word: `--rollout-adapter=served`. What
    follows the script is the script's own.
    """
    import trl_turbo
    from trl_turbo._logs import rank
    from trl_turbo.cli.script import UsageError, flush, planned, run_script, split
    from trl_turbo.patches.people.attach import before_training

    try:
        keywords, (script, *arguments) = split(context.args)
        found = trl_turbo.patch(strict=strict, **keywords)
    except (UsageError, TypeError, ValueError, trl_turbo.PatchError) as error:
        typer.echo(f"trl-turbo run: {error}", err=True)
        raise typer.Exit(2) from error
    if plan and rank() == 0:
        typer.echo(str(found), err=True)
        before_training.append(lambda trainer: typer.echo(planned(trainer), err=True))
    code = run_script(script, arguments)
    flush()
    sys.exit(code)


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


@app.command(
    epilog="**Examples**: `trl-turbo plan Qwen/Qwen2.5-1.5B-Instruct --trainer grpo --group 8 --completion 4096 "
    "--gpu 24` · `trl-turbo plan ./my-model --trainer dpo --load-in-4bit --json`"
)
def plan(
    model: Annotated[str, typer.Argument(help="Name on the Hub, or a folder; its configuration alone is read.")],
    trainer: Annotated[str, typer.Option(help="grpo, rloo, dpo, online_dpo or ppo.")] = "grpo",
    group: Annotated[int, typer.Option(min=1, help="Sequences that are sampled together.")] = 8,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the longest prompt.")] = 512,
    completion: Annotated[int, typer.Option(min=1, help="Tokens of the longest completion.")] = 4096,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="per_device_train_batch_size; the group if left out.")
    ] = None,
    gpu: Annotated[float | None, typer.Option(min=0, help="Memory of the GPU in GiB.")] = None,
    lora_rank: Annotated[int, typer.Option(min=0, help="Rank of the LoRA adapter; 0 trains all weights.")] = 16,
    load_in_4bit: Annotated[bool, typer.Option(help="Plan with a base in 4 bits.")] = False,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Plan with gradient checkpointing.")] = True,
    vllm: Annotated[bool, typer.Option(help="Plan with a vLLM in the trainer's process.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
) -> None:
    """Predict where each gigabyte of a training goes, and whether a GPU holds it, without loading the model.

    The exit code is 1 where the GPU does not hold it.
    """
    from transformers import AutoConfig

    from trl_turbo.memory_plan import predict

    try:
        found = predict(
            AutoConfig.from_pretrained(model),
            trainer=trainer,
            group=group,
            prompt=prompt,
            completion=completion,
            micro_batch=micro_batch,
            lora_rank=lora_rank,
            load_in_4bit=load_in_4bit,
            gradient_checkpointing=gradient_checkpointing,
            vllm=vllm,
            gpu_bytes=None if gpu is None else int(gpu * 2**30),
        )
    except (OSError, ValueError) as error:
        # A name that is no model's: transformers says so in several lines, of which the first is enough
        typer.echo(f"trl-turbo plan: {str(error).splitlines()[0]}", err=True)
        raise typer.Exit(2) from error
    typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else str(found))
    if found.fits is False:
        raise typer.Exit(1)


@app.command(epilog="**Examples**: `trl-turbo samples outputs` · `watch trl-turbo samples outputs -n 3`")
def samples(
    output_dir: Annotated[Path, typer.Argument(help="The trainer's output_dir.")],
    n: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 8,
) -> None:
    """Print the completions that a training, running or ended, sampled last."""
    from trl_turbo.dashboard.samples import read

    try:
        found = read(output_dir, n)
    except FileNotFoundError as error:
        typer.echo(f"trl-turbo samples: {error}", err=True)
        raise typer.Exit(2) from error
    _console().print(found)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="trl-turbo")  # under `python -m` too
