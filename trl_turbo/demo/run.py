"""The demo: make a model, teach it a format, train it with an unmodified TRL script, measure, draw."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

SCRIPT = Path(__file__).with_name("grpo_arithmetic.py")
# The measured run: long answers over a vocabulary of a real model's order, where the logits outweigh all else.
WIDE_VOCABULARY, WIDE_BATCH, WIDE_LENGTH, WIDE_STEPS = 32_768, 16, 64, 3
MIB = 2**20


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    out: Path
    steps: int = 250
    seed: int = 0
    stock: bool = False
    compare: bool = True


@contextlib.contextmanager
def quiet_and_offline() -> Iterator[None]:
    """No hub, and none of the libraries' chatter between the bars."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Matrices this small gain nothing from a second thread, which on a busy machine costs much: threads wait for each
    # other at every operation (measured beside other work on two cores: 323 s of CPU time with two, 86 s with one).
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not sys.stderr.isatty():
        # A log file keeps each refresh of a bar as a line.
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run(options: Options, console: Console) -> bool:
    """Run all of it; returns whether the reward rose."""
    import trl_turbo
    from trl_turbo.demo.curve import draw_png, draw_text, judge, smooth
    from trl_turbo.demo.measure import read_history

    started = time.perf_counter()
    with quiet_and_offline():
        options.out.mkdir(parents=True, exist_ok=True)
        model = prepare(options, console)
        trained = train(model, options, console)
        rewards = [entry["rewards/is_right/mean"] for entry in read_history(trained)]
        compared = compare(options, console) if options.compare else {}

    rise = judge(rewards)
    console.rule("Result")
    if not options.stock:
        console.print(str(trl_turbo.status()), highlight=False, markup=False, soft_wrap=True)
    console.print(draw_text(smooth(rewards, 10)), highlight=False)
    picture = options.out / "reward.png"
    if not draw_png(rewards, picture, title=f"GRPO on sums up to 19+19, {len(rewards)} steps"):
        console.print("No PNG: matplotlib is not installed; pip install 'trl-turbo[plot]' brings it.")
    summary = {"rewards": rewards, "rise": asdict(rise), "rose": rise.visible, "measured": compared}
    (options.out / "demo.json").write_text(json.dumps(summary, indent=2))
    console.print(f"[bold]{rise}[/bold]", highlight=False)
    console.print(f"Wrote {options.out} in {time.perf_counter() - started:.0f} s.", highlight=False)
    if not rise.visible:
        console.print("[red]The reward did not rise: train for more steps with --steps, or try another --seed.[/red]")
    return rise.visible


def prepare(options: Options, console: Console) -> Path:
    """Make the model and teach it the format; returns its folder."""
    from trl_turbo.demo.arithmetic import teach_format
    from trl_turbo.demo.tiny import make_model, make_tokenizer, save

    console.rule("1  A small model learns what a sum looks like")
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=options.seed)
    size = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"Qwen2 with {size:,} random parameters; one token a character", highlight=False)
    steps, loss = teach_format(model, tokenizer, seed=options.seed, console=console)
    console.print(f"{steps} supervised steps: loss {loss:.2f} nats a token", highlight=False)
    return save(options.out / "model", model, tokenizer)


def train(model: Path, options: Options, console: Console) -> Path:
    """Run the GRPO script in this process, after `patch()` unless stock; returns its output folder."""
    import trl_turbo
    from trl_turbo.demo.measure import run_script

    console.rule("2  An unmodified TRL script teaches it to add")
    if not options.stock:
        trl_turbo.patch()
    out, log = options.out / "grpo", options.out / "grpo.log"
    console.print(f"running {SCRIPT.name}; what it prints goes to {log}", highlight=False)
    arguments = ["--model", str(model), "--output_dir", str(out)]
    arguments += ["--max_steps", str(options.steps), "--seed", str(options.seed)]
    # The bar is on stderr and stays; the trainer's line for each step is not worth a screen.
    with log.open("w") as stream, contextlib.redirect_stdout(stream):
        run_script(SCRIPT, arguments)
    return out


def compare(options: Options, console: Console) -> dict[str, object]:
    """Measure the same script stock and patched, over a wide vocabulary, and print both."""
    import trl_turbo
    from trl_turbo.demo.measure import measure
    from trl_turbo.demo.tiny import make_model, make_tokenizer, save

    console.rule("3  The same script, stock and patched, over a wide vocabulary")
    tokenizer = make_tokenizer(WIDE_VOCABULARY)
    wide = save(options.out / "wide", make_model(tokenizer, seed=options.seed), tokenizer)
    arguments = ["--model", str(wide), "--max_steps", str(WIDE_STEPS), "--seed", str(options.seed)]
    arguments += ["--per_device_train_batch_size", str(WIDE_BATCH), "--max_completion_length", str(WIDE_LENGTH)]
    # An untrained model is never right; for the gradient not to be zero, its answers must differ in some reward.
    arguments += ["--brevity", "0.01"]
    found = {}
    for name, patched in (("stock", False), ("patched", True)):
        with console.status(f"measuring {name}"):
            found[name] = measure(SCRIPT, arguments, output_dir=options.out / f"measured-{name}", patched=patched)
    table = Table("", "peak memory", "seconds a step", "gradient norms")
    for name, result in found.items():
        norms = "  ".join(f"{norm:.5f}" for norm in result.grad_norms)
        table.add_row(name, f"{result.peak_bytes / MIB:,.0f} MiB", f"{result.step_s:.2f}", norms)
    console.print(table)
    console.print(
        f"{WIDE_BATCH} answers of {WIDE_LENGTH} tokens over a vocabulary of {WIDE_VOCABULARY:,}, in fp32 on the CPU, "
        "each in a process of its own. Peak memory: resident, less what Python, torch and TRL held before the script. "
        "Seconds a step: the median without the first, sampling included.",
        highlight=False,
    )
    same = found["patched"].peak_bytes > 0.95 * found["stock"].peak_bytes
    if same and "logprob.fused_head" in trl_turbo.status():
        console.print(
            "This TRL has a fused head of its own, which patch() leaves in place where ours measures no faster, as on "
            "the CPU: both runs are TRL's here. On TRL before 1.15 the same table shows the difference.",
            highlight=False,
        )
    return {name: asdict(result) for name, result in found.items()}
