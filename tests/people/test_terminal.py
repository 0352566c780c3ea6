"""The live table on a real terminal: a training in a pseudo-terminal, and what its screen then shows."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trl_turbo.dashboard.table import BLOCKS, sparkline

ROOT = Path(__file__).parents[2]
SIZE = (40, 120)
SCRIPT = """
import sys, time
from pathlib import Path
import trl_turbo
trl_turbo.patch(verbose=False)
from tests.people.trainings import grpo, vowels, brief
from transformers import TrainerCallback

class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.3)  # tqdm draws at most ten times a second
        if state.global_step == 4:
            Path(sys.argv[2], "held").touch()
            while not Path(sys.argv[2], "go").exists():
                time.sleep(0.1)

trainer = grpo(Path(sys.argv[1]), Path(sys.argv[2]), 5, beta=0.1, disable_tqdm=False)
trainer.add_callback(Slow())
trainer.train()
print("DONE")
"""


class Screen:
    """What somebody sees who runs a command in a terminal of `SIZE`."""

    def __init__(self, command: list[str]) -> None:
        pyte = pytest.importorskip("pyte", reason="pyte, which reads what a terminal shows, is not installed")
        self.screen = pyte.Screen(SIZE[1], SIZE[0])
        self._stream = pyte.ByteStream(self.screen)
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE, 0, 0))
        env = {**os.environ, "TERM": "xterm", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=env, cwd=ROOT)
        os.close(slave)
        self.seen = b""

    def read_until(self, ready: Callable[[], bool], timeout: float = 240) -> None:
        """Read until it is ready and has nothing more to say."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if select.select([self.master], [], [], 0.5)[0]:
                try:
                    found = os.read(self.master, 65536)
                except OSError:  # the other end is closed
                    break
                self.seen += found
                self._stream.feed(found)
            elif ready():
                break
        assert ready(), self.seen[-3000:].decode(errors="replace")

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display if line.strip()]

    def close(self) -> int:
        code = self.process.wait(60)
        os.close(self.master)
        return code


def rows_of(lines: list[str], name: str) -> list[str]:
    return [line for line in lines if line.split("  ")[0].strip() == name]


@pytest.mark.trl
@pytest.mark.slow
def test_a_table_under_the_progress_bar_and_one_that_stays(tiny: Path, tmp_path: Path) -> None:
    screen = Screen([sys.executable, "-c", SCRIPT, str(tiny), str(tmp_path)])
    screen.read_until((tmp_path / "held").exists)
    live = screen.lines
    for name in ("reward", "rewards/vowels/mean", "rewards/brief/mean", "loss", "kl", "entropy", "tokens_per_second"):
        rows = rows_of(live, name)
        assert len(rows) == 1, f"{name} is on the screen {len(rows)} times:\n" + "\n".join(live)
        assert any(block in rows[0] for block in BLOCKS)
    assert len(rows_of(live, "completions/mean_length")) == 1
    assert len(rows_of(live, "memory/sampling (GiB)")) == 1
    (tmp_path / "go").touch()
    screen.read_until(lambda: b"DONE" in screen.seen)
    end = screen.lines
    assert screen.close() == 0
    assert len(rows_of(end, "reward")) == 1, "the live table is gone, and one stays:\n" + "\n".join(end)
    assert any("5/5" in line for line in end), "the trainer's own bar is there still:\n" + "\n".join(end)
    assert "train_runtime" in "".join(end), "and so are the lines that it writes:\n" + "\n".join(end)


def test_a_sparkline_goes_from_the_lowest_to_the_highest() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == BLOCKS
    assert sparkline([5.0, 5.0]) == BLOCKS[3] * 2
    assert sparkline(range(100), 4) == sparkline([96, 97, 98, 99])
    assert sparkline([]) == ""
