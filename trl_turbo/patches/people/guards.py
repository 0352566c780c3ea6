"""The guards of a training that is running, as a callback: each warns once, with the remedy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback

from trl_turbo.patches.people import before
from trl_turbo.patches.people.warn import wanted, warn
from trl_turbo.report import note

#: For how many steps a reward must be constant, or every completion truncated.
STEPS = 10
#: Mean distance of a token's log-prob in rollout and trainer. bf16 alone gives some hundredths.
DRIFT = 0.1
#: In how many logs in a row a condition must hold: one log may be a bad batch.
LOGS = 3

CONSTANT = (
    "the reward has been the same in every group for {steps} steps, so that no gradient says anything: check the "
    "reward function on a few completions (trl_turbo.samples(trainer) shows them), make the task easier or the "
    "temperature higher, or give partial rewards"
)
TRUNCATED = (
    "no completion has come to its end for {steps} steps: raise {argument} (it is {length}), or check that the model "
    "writes the tokenizer's eos_token ({eos!r}), which a base model with a chat template often does not"
)
DRIFTED = (
    "the log-probs of rollouts are {drift:.2f} nats a token away from the trainer's: look for weights that are not "
    "synced or are quantised in one of the two, for another dtype or another temperature; patch() samples "
    "from the trainer's own weights, and cast_lm_head_to_fp32=True makes the heads agree"
)


class Streak:
    """For how long a condition has held without a break.

    Args:
        steps: How many steps it must hold.
        logs: How many logs it must hold.
    """

    def __init__(self, steps: int, logs: int) -> None:
        self._steps, self._logs = steps, logs
        self._held = 0
        self._since = 0
        self._last = 0

    def see(self, holds: bool, step: int) -> int | None:
        """Take one log; return for how many steps the condition has held where that is long enough, else `None`."""
        if not holds:
            self._held, self._last = 0, step
            return None
        if self._held == 0:
            self._since = self._last
        self._held, self._last = self._held + 1, step
        held_for = step - self._since
        return held_for if self._held >= self._logs and held_for >= self._steps else None


class Guards(TrainerCallback):
    """Watches what a trainer logs, and looks at its data before it begins.

    Args:
        trainer: A TRL trainer, on rank 0.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._score: Any = None
        self._told: set[str] = set()
        self._streaks = {
            "constant_reward": Streak(STEPS, LOGS),
            "truncated": Streak(STEPS, LOGS),
            "logp_drift": Streak(0, LOGS),
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Look at what is known before the first step."""
        for guard, check in before.CHECKS.items():
            if wanted(guard):
                self._guarded(guard, functools.partial(check, self._trainer))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Look at what was logged."""
        # Those of an evaluation have names of their own
        numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, (int, float))}
        for guard, text in (
            ("constant_reward", self._constant_reward),
            ("truncated", self._truncated),
            ("logp_drift", self._drift),
        ):
            if wanted(guard) and guard not in self._told:
                self._guarded(guard, functools.partial(text, numbers, state.global_step))

    def finish(self) -> None:
        """Nothing is left to be done."""

    def _guarded(self, guard: str, check: Callable[[], str | None]) -> None:
        try:
            text = check()
        except Exception as error:
            note("guards", f"{guard} could not be looked at: {type(error).__name__}: {error}")
            return
        if text is not None:
            self._told.add(guard)
            warn(guard, text)

    def _constant_reward(self, logs: Mapping[str, float], step: int) -> str | None:
        if "frac_reward_zero_std" in logs:
            holds = logs["frac_reward_zero_std"] == 1
        elif "reward_std" in logs:
            holds = logs["reward_std"] == 0
        elif "objective/scores" in logs:
            holds, self._score = logs["objective/scores"] == self._score, logs["objective/scores"]
        else:
            return None
        steps = self._streaks["constant_reward"].see(holds, step)
        return None if steps is None else CONSTANT.format(steps=steps)

    def _truncated(self, logs: Mapping[str, float], step: int) -> str | None:
        if "completions/clipped_ratio" in logs:
            holds = logs["completions/clipped_ratio"] == 1
        elif "val/contain_eos_token" in logs:
            holds = logs["val/contain_eos_token"] == 0
        elif "val/num_eos_tokens" in logs:
            holds = logs["val/num_eos_tokens"] == 0
        else:
            return None
        steps = self._streaks["truncated"].see(holds, step)
        if steps is None:
            return None
        argument, length = before.completion_length(self._trainer.args)
        tokenizer = self._trainer.processing_class
        return TRUNCATED.format(
            steps=steps, argument=argument, length=length, eos=getattr(tokenizer, "eos_token", None)
        )

    def _drift(self, logs: Mapping[str, float], step: int) -> str | None:
        drift = logs.get("sampling/sampling_logp_difference/mean")
        if drift is None or self._streaks["logp_drift"].see(drift > DRIFT, step) is None:
            return None
        # The number is of this moment; without it the warning would be another one in each log
        self._streaks["logp_drift"] = Streak(1 << 62, LOGS)
        return DRIFTED.format(drift=drift)
