"""The dashboard: it shows and writes what a training logs, and the training is the same to the bit without it."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from transformers import TrainerCallback, set_seed

import trl_turbo
from trl_turbo.dashboard import memory
from trl_turbo.dashboard.record import CHARTS, Record

from .trainings import PROMPTS, TRAINERS, dpo, grpo, vowels

pytestmark = pytest.mark.trl


def made(name: str, tiny: Path, out: Path, *args: Any, **options: Any) -> Any:
    try:
        return TRAINERS[name](tiny, out, *args, **options)
    except ModuleNotFoundError as error:
        pytest.skip(f"TRL {trl.__version__} has no {name} here: {error}")


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "_trl_turbo" / "metrics.jsonl").read_text().splitlines()]


def numbers(trainer: Any) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """What a training computed: its logs without what a clock says, and the weights at its end."""
    clock = ("time", "second", "runtime", "eps", "flos")
    logs = [
        {name: repr(value) for name, value in entry.items() if not any(word in name for word in clock)}
        for entry in trainer.state.log_history
    ]
    return logs, {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("name", TRAINERS)
def test_numbers_are_the_same_to_the_bit_with_and_without(name: str, tiny: Path, tmp_path: Path) -> None:
    found = []
    for on in (False, True):
        trl_turbo.patch(dashboard=on, guards=on, strict=True, verbose=False)
        set_seed(5)
        trainer = made(name, tiny, tmp_path / str(on), 3, disable_tqdm=True)
        set_seed(7)  # PPO draws its first batch from wherever the process is
        trainer.train()
        found.append(numbers(trainer))
        assert (tmp_path / str(on) / "_trl_turbo").exists() == on
        assert [type(c).__module__ for c in trainer.callback_handler.callbacks if "turbo" in type(c).__module__] == []
    (logs, weights), (watched_logs, watched_weights) = found
    assert len(logs) > 2
    assert logs == watched_logs
    assert all(torch.equal(value, watched_weights[key]) for key, value in weights.items())


#: What each trainer's log must have a chart of.
SHOWN = {
    "grpo": ["Reward", "Loss", "Entropy", "Completion length", "Tokens/s", "Memory, GiB", "Gradient norm", "KL"],
    "rloo": ["Reward", "Loss", "Entropy", "Completion length", "Tokens/s", "Memory, GiB", "Gradient norm", "KL"],
    "dpo": ["Reward", "Loss", "Memory, GiB", "Gradient norm"],
    "online_dpo": ["Reward", "Loss", "KL", "Entropy", "Memory, GiB", "Gradient norm"],
    "ppo": ["Reward", "Loss", "KL", "Entropy", "Memory, GiB"],
}


@pytest.mark.parametrize("name", TRAINERS)
def test_writes_what_the_trainer_logs_and_a_report(name: str, tiny: Path, tmp_path: Path) -> None:
    trl_turbo.patch(strict=True, verbose=False)
    trainer = made(name, tiny, tmp_path, 3, disable_tqdm=True, **({"beta": 0.1} if name in ("grpo", "rloo") else {}))
    trainer.train()
    first, *logged = rows(tmp_path)
    assert first["run"]["trainer"] == type(trainer).__name__
    own = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    kept = [row for row in logged if "train_runtime" not in row]
    assert len(own) == len(kept) >= 3
    for entry, row in zip(own, kept, strict=True):
        finite = {k: v for k, v in entry.items() if isinstance(v, float) and math.isfinite(v)}
        assert finite.items() <= row.items()
    record = Record({}, logged)
    assert set(SHOWN[name]) <= set(record.series()), "a chart of what TRL logs is missing"
    page = (tmp_path / "_trl_turbo" / "report.html").read_text()
    for title in SHOWN[name]:
        assert f">{title}<" in page
    # The names of SVG's own vocabularies are no addresses of anything that is fetched
    assert not re.findall(r"https?://(?!www\.w3\.org/)|src=|@import|url\((?!#)", page)
    assert not memory.running, "the thread that samples memory has ended"


def test_each_reward_function_has_its_line_and_every_phase_its_memory(tiny: Path, tmp_path: Path) -> None:
    trl_turbo.patch(verbose=False)
    grpo(tiny, tmp_path, beta=0.1, num_iterations=2).train()
    _, *logged = rows(tmp_path)
    series = Record({}, logged).series()
    assert {"reward", "rewards/vowels/mean", "rewards/brief/mean"} == set(series["Reward"])
    # Two iterations: old log-probs are computed apart from the loss
    phases = {"memory/sampling", "memory/rewards", "memory/scoring", "memory/loss", "memory/training"}
    assert phases | {"memory/optimizer"} == set(series["Memory, GiB"])
    for points in series["Memory, GiB"].values():
        assert all(0.1 < value < 50 for _, value in points), "a process with torch in it"
    tokens = [row["num_tokens"] for row in logged if "num_tokens" in row]
    times = [row["time_s"] for row in logged if "num_tokens" in row]
    rates = [value for _, value in series["Tokens/s"]["tokens_per_second"]]
    # The log rounds times to a millisecond
    assert rates[1] == pytest.approx((tokens[1] - tokens[0]) / (times[1] - times[0]), rel=0.1)


def test_a_push_to_the_hub_leaves_it_here(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    """Prompts and completions are in the folder; what the trainer uploads is asked of its own arguments."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects
    from transformers import trainer as module

    trl_turbo.patch(verbose=False)
    trainer = grpo(tiny, tmp_path, 1, disable_tqdm=True)
    trainer.train()
    asked: dict[str, Any] = {}
    # A function of the module in transformers 4, a method of the API in 5
    owner = module if hasattr(module, "upload_folder") else HfApi
    monkeypatch.setattr(owner, "upload_folder", lambda *api, **kwargs: asked.update(kwargs))
    monkeypatch.setattr(trainer, "create_model_card", lambda **kwargs: None)
    trainer.hub_model_id = "somebody/model"
    trainer.push_to_hub()
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert "_trl_turbo/samples.jsonl" in files
    sent = list(filter_repo_objects(files, ignore_patterns=asked["ignore_patterns"]))
    assert sent
    assert not [path for path in sent if "trl_turbo" in path]


def test_trls_own_loggers_are_left_as_they_are(tiny: Path, tmp_path: Path, capfd) -> None:
    """`log_completions`, a logger of the script's, and what the log is given to them with."""
    seen = []
    for on in (False, True):
        heard: list[list[str]] = []

        class Logger(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                heard.append(sorted(logs))  # noqa: B023

        trl_turbo.patch(dashboard=on, verbose=False)
        trainer = grpo(tiny, tmp_path / str(on), 2, log_completions=True, disable_tqdm=True)
        trainer.add_callback(Logger())
        trainer.train()
        printed = [line for line in capfd.readouterr().out.splitlines() if "Step" in line or "Completion" in line]
        seen.append((heard, printed, sorted(path.name for path in (tmp_path / str(on)).iterdir())))
    (heard, printed, files), (watched, watched_printed, watched_files) = seen
    assert len(heard) >= 3
    assert heard == watched
    assert printed == watched_printed
    assert any("Completion" in line for line in printed)
    assert watched_files == sorted([*files, "_trl_turbo"])


@pytest.mark.parametrize("off", ["keyword", "environment"])
def test_off_writes_and_shows_nothing(off: str, tiny: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    if off == "environment":
        monkeypatch.setenv("TRL_TURBO_DASHBOARD", "0")
    found = trl_turbo.patch(verbose=False, **({"dashboard": False} if off == "keyword" else {}))
    assert {row.status.value for row in found if row.feature == "dashboard"} == {"off"}
    grpo(tiny, tmp_path, 2).train()
    assert not (tmp_path / "_trl_turbo").exists()


def test_no_terminal_no_display(tiny: Path, tmp_path: Path, capfd) -> None:
    trl_turbo.patch(verbose=False)
    grpo(tiny, tmp_path, 2, disable_tqdm=False).train()
    assert "lowest" not in capfd.readouterr().err, "stderr is no terminal here"
    assert len(rows(tmp_path)) > 2


def test_a_trainer_that_was_made_before_patch_is_shown_and_none_after_unpatch(tiny: Path, tmp_path: Path) -> None:
    trainer = grpo(tiny, tmp_path / "one", 2)
    trl_turbo.patch(verbose=False)
    trainer.train()
    assert len(rows(tmp_path / "one")) > 2
    trl_turbo.unpatch()
    grpo(tiny, tmp_path / "two", 2).train()
    assert not (tmp_path / "two" / "_trl_turbo").exists()


def test_trainers_of_transformers_are_left_alone(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    trl_turbo.patch(verbose=False)
    data = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
    Trainer(AutoModelForCausalLM.from_pretrained(tiny), args, train_dataset=data).train()
    assert not (tmp_path / "_trl_turbo").exists()


def test_a_training_that_breaks_off_has_its_report_and_raises_its_own_error(tiny: Path, tmp_path: Path) -> None:
    calls = []

    def breaks(completions: list[str], **kwargs: object) -> list[float]:
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError("mine")
        return vowels(completions)

    trl_turbo.patch(verbose=False)
    trainer = grpo(tiny, tmp_path, 5, rewards=(breaks,))
    with pytest.raises(ZeroDivisionError, match="mine"):
        trainer.train()
    assert len(rows(tmp_path)) == 3
    assert ">Reward<" in (tmp_path / "_trl_turbo" / "report.html").read_text()
    assert not memory.running


def test_what_cannot_be_written_is_a_note_and_the_training_goes_on(tiny: Path, tmp_path: Path, caplog) -> None:
    report = trl_turbo.patch(verbose=False)
    trainer = grpo(tiny, tmp_path, 2)
    (tmp_path / "_trl_turbo").write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING, "trl_turbo"):
        trainer.train()
    assert trainer.state.global_step == 2
    notes = [note.text for note in report.notes if note.feature == "dashboard"]
    assert len(notes) == 1
    assert notes[0].startswith("it stopped at step 0, the training goes on: FileExistsError: ")
    assert not memory.running


def test_resuming_adds_to_the_log(tiny: Path, tmp_path: Path) -> None:
    trl_turbo.patch(verbose=False)
    grpo(tiny, tmp_path, 2, save_strategy="steps", save_steps=2).train()
    before = len(rows(tmp_path))
    grpo(tiny, tmp_path, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    found = rows(tmp_path)[before:]
    assert found[0]["run"]["resumed_at"] == 2
    assert [row["step"] for row in found[1:3]] == [3, 4]
    grpo(tiny, tmp_path, 2).train()
    assert len(rows(tmp_path)) == before, "a new run begins a new log"


def test_samples_are_those_that_were_sampled_last(tiny: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def watching(completions: list[str], **kwargs: object) -> list[float]:
        seen[:] = completions
        return vowels(completions)

    trl_turbo.patch(verbose=False)
    trainer = grpo(tiny, tmp_path, 2, rewards=(watching,))
    trainer.train()
    found = trl_turbo.samples(trainer, 3)
    assert [sample.completion for sample in found] == seen[-3:]
    assert [sample.rewards["watching"] for sample in found] == pytest.approx(vowels(seen[-3:]))
    # Some TRLs decode the prompt without its spaces
    asked = {prompt.replace(" ", "") for prompt in PROMPTS}
    assert {sample.prompt.replace(" ", "") for sample in found} <= asked
    assert "watching" in str(found)
    assert "<table" in found._repr_html_()
    from trl_turbo.dashboard.samples import read

    assert [s.completion for s in read(tmp_path)] == [s.completion for s in trl_turbo.samples(trainer)]
    with pytest.raises(TypeError, match="DPOTrainer keeps no completions; samples"):
        trl_turbo.samples(dpo(tiny, tmp_path))
    with pytest.raises(FileNotFoundError, match="name the output_dir of a GRPO or RLOO run"):
        read(tmp_path / "nowhere")


def test_what_a_model_writes_is_no_markup(tiny: Path, tmp_path: Path) -> None:
    from trl_turbo.dashboard.html import page
    from trl_turbo.dashboard.samples import Sample, Samples

    record = Record({"trainer": "T"})
    record.add({"loss": float("nan"), "reward": 1.0}, step=1, time_s=1)
    text = page(record, Samples([Sample("<script>alert(1)</script>", "a<b", {"f": None}, 0.5)], 1))
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert json.loads(json.dumps(record.rows[0], allow_nan=False))["loss"] is None


def test_without_matplotlib_the_report_says_so(monkeypatch) -> None:
    from trl_turbo.dashboard.html import page

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    record = Record({"trainer": "T"})
    record.add({"reward": 1.0}, step=1, time_s=1)
    found = page(record)
    assert "No charts: matplotlib is not installed; pip install 'trl-turbo[plot]' brings it." in found
    assert "<svg" not in found


def test_nobodys_peak_is_reset(monkeypatch) -> None:
    """Attribution from what a process reports: samples, and its peak where a phase raised that."""
    now, peak = [10], [10]
    found = memory.PhaseMemory(lambda: now[0], lambda: peak[0])
    found.enter("sampling")
    now[0], peak[0] = 30, 50  # it rose to 50 between two samples
    found.leave()
    found.switch(memory.OPTIMIZER)
    now[0] = 40
    found.switch(memory.TRAINING)
    assert found.take() == {"training": 40, "sampling": 50, "optimizer": 40}
    assert found.take() == {"training": 40}


def test_every_chart_is_of_something() -> None:
    names = {"Reward": "rewards/f/mean", "Loss": "loss/policy_avg", "KL": "kl", "Entropy": "eval_entropy"}
    record = Record()
    record.add(dict.fromkeys(names.values(), 1.0), step=1, time_s=1)
    assert record.series().keys() == names.keys() <= CHARTS.keys()
    record = Record()
    record.add({"rewards/f/std": 1.0, "entropy_coef": 1.0, "clip_ratio/low": 1.0}, step=1, time_s=1)
    assert record.series() == {}
