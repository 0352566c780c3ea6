"""The plan: bytes by part at each moment of a step, and the longest sequence that fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

GIB = 1 << 30
#: Moments of a step, in order: sampling, making log-probs, and backward through the layers.
ROLLOUT, SCORING, BACKWARD = "rollout", "scoring", "backward"
#: What torch has from training and keeps in a rollout whose KV cache is little, where there is room.
KEPT = "kept by torch"
#: The phases that are measured, and the moments in them.
PHASES = {"rollout": (ROLLOUT,), "training": (SCORING, BACKWARD)}
#: Arguments of trainers for the tokens of a completion; `max_completion_length` of the others.
LENGTHS = {"dpo": "max_length", "online_dpo": "max_new_tokens", "ppo": "response_length"}
#: What to set for a smaller part. Parts in `FEATURES_FOR` have it where none of their features is left to turn on.
REMEDIES = {
    "weights": "load the model with load_in_4bit=True",
    "other models": "train a LoRA adapter (peft_config), which needs no copy of the model as its reference",
    "adapters": "lower the adapter's rank",
    "gradients": "train a LoRA adapter (peft_config)",
    "optimizer": "set optim='adamw_8bit'",
    "KV cache": "lower {length}",
    "CUDA graphs": "pass enforce_eager=True to vLLM",
    "sampling": "lower {batch}",
    "layer inputs": "lower {batch}",
    "activations": "set gradient_checkpointing=True",
    "one layer": "lower {batch}",
    "loss tiles": "lower {batch}",
    "logits": "lower {batch}",
    "attention mask": "lower {batch}",
}
#: Features of `patch()` that make a part smaller, and how; of those that are off, the one that spares most is told.
FEATURES_FOR = {
    "layer inputs": {"checkpointing": "keeps them in host memory"},
    "one layer": {
        "lora": "keeps each input once",
        "norms": "keeps no copies in float32",
        "mlp": "keeps less of its MLP",
        "mlp_tiling": "runs its MLP some rows at a time",
    },
    "logits": {"logprob": "never makes them"},
    "attention mask": {"attention": "needs none"},
}


@dataclass(frozen=True)
class MemoryPlan:
    """Where each byte of a device goes.

    Attributes:
        moments: Moment -> part -> bytes; a moment that a trainer does not have is not there.
        settings: What the plan was made for.
        gpu_bytes: Size of the device, `None` where it is not known.
        notes: What it does not cover, in sentences.
    """

    moments: Mapping[str, Mapping[str, int]]
    settings: Mapping[str, Any]
    gpu_bytes: int | None = None
    notes: tuple[str, ...] = ()
    _again: Callable[..., MemoryPlan] | None = field(default=None, repr=False, compare=False)

    def total(self, moment: str) -> int:
        """Bytes at one moment."""
        return sum(self.moments[moment].values())

    def phase_bytes(self, phase: str) -> int | None:
        """The peak of `"rollout"` or `"training"`; `None` where the trainer has no such phase."""
        totals = [self.total(moment) for moment in PHASES[phase] if moment in self.moments]
        return max(totals, default=None)

    @property
    def peak_bytes(self) -> int:
        """The largest of all moments."""
        return max(map(self.total, self.moments))

    @property
    def fits(self) -> bool | None:
        """Whether the device holds it; `None` where its size is not known."""
        return None if self.gpu_bytes is None else self.peak_bytes <= self.gpu_bytes

    def largest_part(self, phase: str | None = None) -> tuple[str, str]:
        """The moment that takes most, and its largest part that a setting can make smaller.

        Args:
            phase: Look at its moments alone.
        """
        moments = [m for m in (PHASES[phase] if phase else self.moments) if m in self.moments]
        moment = max(moments, key=lambda moment: self.total(moment) - self.moments[moment].get(KEPT, 0))
        parts = {part: size for part, size in self.moments[moment].items() if part in REMEDIES}
        # Weights are there for a reason: something that grows with the sequences is what overflowed
        growing = {part: size for part, size in parts.items() if part not in ("weights", "adapters")}
        found = growing or parts
        return moment, max(found, key=found.__getitem__)

    def remedy(self, moment: str, part: str) -> str:
        """The one setting to change for a smaller part, in words; none that is set so already.

        Args:
            moment: Of `moments`.
            part: Of the moment's parts, with an entry in `REMEDIES`.
        """
        left = self._spared(moment, part)
        if left:
            feature = max(left, key=left.__getitem__)
            return f"set patch({feature}=True), which {FEATURES_FOR[part][feature]}"
        said = self.settings
        if part == "gradients" and any("adapters" in parts for parts in self.moments.values()):
            return REMEDIES["adapters"]
        if part == "optimizer" and "8bit" in said["optimizer"]:
            return self.remedy(moment, "gradients")
        length = LENGTHS.get(said["trainer"], "max_completion_length")
        batch = "per_device_train_batch_size" if said["micro_batch"] > 1 else length
        if part == "sampling" and said["trainer"] == "ppo":
            batch = "local_rollout_forward_batch_size"
        return REMEDIES[part].format(length=length, batch=batch)

    def _spared(self, moment: str, part: str) -> dict[str, int]:
        """Bytes of a part by the feature that is off and would spare them."""
        if self._again is None:
            return {}
        on = tuple(self.settings["features"])
        found = {}
        for feature in FEATURES_FOR.get(part, {}):
            if feature not in on:
                then = self._again(features=(*on, feature)).moments[moment].get(part, 0)
                found[feature] = self.moments[moment][part] - then
        return {feature: size for feature, size in found.items() if size > 0}

    def longest_sequence(self, gpu_bytes: int | None = None) -> int:
        """The most completion tokens that fit, all else alike; 0 where not even one does.

        Args:
            gpu_bytes: Memory to fit into; that of the plan by default.

        Raises:
            ValueError: No size of the device is known.
        """
        limit = gpu_bytes if gpu_bytes is not None else self.gpu_bytes
        if limit is None or self._again is None:
            raise ValueError("the device's size is not known; pass gpu_bytes")
        fits = 0
        step = 1
        while step <= 1 << 24 and self._again(completion=step).peak_bytes <= limit:
            fits, step = step, 2 * step
        low, high = fits, min(step, 1 << 24)
        while high - low > 1:
            middle = (low + high) // 2
            if self._again(completion=middle).peak_bytes <= limit:
                low = middle
            else:
                high = middle
        return low

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain dicts, lists, numbers and strings."""
        return {
            "settings": dict(self.settings),
            "moments": {moment: dict(parts) for moment, parts in self.moments.items()},
            "totals": {moment: self.total(moment) for moment in self.moments},
            "peak_bytes": self.peak_bytes,
            "gpu_bytes": self.gpu_bytes,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        names = list(dict.fromkeys(part for parts in self.moments.values() for part in parts))
        width = max(map(len, (*names, "part")))
        lines = ["  ".join([f"{'GiB':<{width}}", *(f"{moment:>9}" for moment in self.moments)])]
        for name in names:
            cells = [parts.get(name, 0) for parts in self.moments.values()]
            shown = [f"{size / GIB:>9.2f}" if size else f"{'-':>9}" for size in cells]
            lines.append("  ".join([f"{name:<{width}}", *shown]))
        totals = [f"{self.total(moment) / GIB:>9.2f}" for moment in self.moments]
        lines.append("  ".join([f"{'total':<{width}}", *totals]))
        if self.gpu_bytes is not None:
            words = "fits" if self.fits else "does not fit"
            longest = f"; the longest completion that does: {self.longest_sequence():,} tokens" if self._again else ""
            lines.append(f"the device has {self.gpu_bytes / GIB:.1f} GiB: it {words}{longest}")
        lines += [f"note  {note}" for note in self.notes]
        return "\n".join(lines)
