"""The report in a real browser: headless Chromium renders the file, and what it shows is looked at."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import trl_turbo

from .trainings import grpo

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTH, HEIGHT = 1200, 2400
#: The first two colours in which matplotlib draws a line.
BLUE, ORANGE = (0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)

pytestmark = [
    pytest.mark.trl,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium"),
]


def chromium(folder: Path, *arguments: str) -> str:
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}",
        # A page that fetched something would show an error in its place
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--window-size={WIDTH},{HEIGHT}",
        "--hide-scrollbars",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trl_turbo.demo.tiny import make_model, make_tokenizer, save

    tokenizer = make_tokenizer()
    folder = tmp_path_factory.mktemp("report")
    tiny = save(folder / "tiny", make_model(tokenizer, hidden_size=64), tokenizer)
    trl_turbo.patch(verbose=False, rollout=False)
    grpo(tiny, folder, 6, beta=0.1, disable_tqdm=True).train()
    trl_turbo.unpatch()
    return folder / "_trl_turbo" / "report.html"


def test_what_is_written_in_it(report: Path, tmp_path: Path) -> None:
    dom = chromium(tmp_path, "--dump-dom", report.as_uri())
    for title in ("Reward", "Loss", "KL", "Entropy", "Completion length", "Tokens/s", "Memory, GiB"):
        assert f">{title}</text>" in dom, title
    for name in ("rewards/vowels/mean", "rewards/brief/mean", "memory/sampling"):
        assert f">{name}</text>" in dom, "the legend of its chart"
    rows = re.findall(r"<tr>\s*<td>([^<]+)</td>", dom)
    assert {"reward", "loss", "kl", "entropy", "tokens_per_second", "memory/loss (GiB)"} <= set(rows)
    assert "Latest completions" in dom
    assert "something" in dom
    assert "GRPOTrainer: what it logged" in dom


def test_what_is_seen_of_it(report: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    chromium(tmp_path, f"--screenshot={tmp_path / 'shot.png'}", report.as_uri())
    picture = (imread(tmp_path / "shot.png")[..., :3] * 255).round().astype(int)
    assert picture.shape[1] == WIDTH
    assert (picture == 255).all(-1).mean() > 0.5, "a white page"
    assert 0.01 < (picture.sum(-1) < 250).mean() < 0.3, "with dark words on it"
    for colour in (BLUE, ORANGE):
        near = (abs(picture - colour).max(-1) < 12).nonzero()
        assert len(near[0]) > 200, "lines are drawn"
    rows, columns = (abs(picture - BLUE).max(-1) < 12).nonzero()
    # Two charts side by side, in four rows under each other
    assert columns.min() < WIDTH / 2 < columns.max()
    assert rows.max() - rows.min() > 500
