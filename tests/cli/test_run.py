"""`trl-turbo run`: the script runs as `python` would run it, patched."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUIET = {"TRL_TURBO_ROLLOUT": "0"}  # sampling has tests of its own
WHO = """
import json, sys
import helper
import trl_turbo
print(json.dumps({
    "name": __name__, "file": __file__, "argv": sys.argv, "path": sys.path[0], "spec": __spec__, "helper": helper.NAME,
    "main": sys.modules["__main__"].__file__, "package": __package__,
    "rows": {row.name: row.status.value for row in trl_turbo.status()},
}))
"""


def start(*command: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **QUIET, **(env or {})}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300)


def run(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return start(sys.executable, "-m", "trl_turbo.cli", "run", *arguments, cwd=cwd, env=env)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "helper.py").write_text("NAME = 'beside the script'\n")
    (tmp_path / "in" / "who.py").write_text(WHO)
    return tmp_path


def test_it_is_the_main_module_with_its_own_arguments_and_folder(folder: Path) -> None:
    patched = run("in/who.py", "--lr", "1", "--strict", "-h", cwd=folder)
    assert patched.returncode == 0, patched.stderr
    found = json.loads(patched.stdout)
    stock = json.loads(start(sys.executable, "in/who.py", "--lr", "1", "--strict", "-h", cwd=folder).stdout)
    rows = found.pop("rows")
    assert stock.pop("rows") == {}
    # Python resolves the folder of the script and leaves its name as it was typed
    assert found.pop("path") == str(Path(stock.pop("path")).resolve())
    assert found == stock
    assert found["argv"] == ["in/who.py", "--lr", "1", "--strict", "-h"]
    assert rows["logprob.grpo"] == "pending"


def test_options_are_features_and_settings(folder: Path) -> None:
    options = ("--no-logprob", "--lora", "--rollout-adapter=served", "--no-guards")
    done = run(*options, "in/who.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert rows["logprob.grpo"] == "off"
    assert rows["lora.linear"] == "pending"
    assert rows["guards.trainer"] == "off"
    assert rows["dashboard.trainer"] == "pending"


@pytest.mark.slow
@pytest.mark.trl
def test_plan_says_where_the_memory_of_each_trainer_goes(tmp_path: Path) -> None:
    from trl_turbo.demo.tiny import make_model, make_tokenizer, save

    tokenizer = make_tokenizer()
    tiny = save(tmp_path / "tiny", make_model(tokenizer, hidden_size=64), tokenizer)
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n"
    code += "from tests.people.trainings import grpo\n"
    code += "grpo(Path(sys.argv[1]), Path('out'), 1, disable_tqdm=True).train()\n"
    (tmp_path / "script.py").write_text(code)
    done = run("--plan", "script.py", str(tiny), cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\nweights ") == 1, done.stderr
    assert re.search(r"^total +[\d.]+", done.stderr, re.MULTILINE)


def test_plan_is_printed_before_the_script(folder: Path) -> None:
    done = run("--plan", "in/who.py", cwd=folder)
    assert "pending  logprob.grpo" in done.stderr
    json.loads(done.stdout)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "no script is named; write `trl-turbo run script.py`, with options of ours before the script"),
        (("--no-logprob",), "no script is named"),
        (("--no-logprop", "in/who.py"), "patch() has no feature 'logprop'; did you mean 'logprob'?"),
        (("--rollout-adapter=fused", "in/who.py"), "patch(rollout_adapter='fused') is not known; set auto, merged or"),
        (("in/nobody.py",), "can't open file 'in/nobody.py': No such file or directory"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(arguments: tuple[str, ...], sentence: str, folder: Path) -> None:
    done = run(*arguments, cwd=folder)
    assert done.returncode == 2
    assert done.stderr.startswith("trl-turbo run: ")
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_strict_fails_where_a_patch_is_skipped(folder: Path) -> None:
    plugin = folder / "plug"
    (plugin / "plug-1.dist-info").mkdir(parents=True)
    (plugin / "plug-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1\n")
    (plugin / "plug-1.dist-info" / "entry_points.txt").write_text("[trl_turbo]\nplug = plug\n")
    (plugin / "plug.py").write_text(
        "import trl_turbo\nfrom trl_turbo.patching import Patch\n\n\n@trl_turbo.hookimpl\ndef turbo_patches(env):\n"
        "    return [Patch('plug.one', 'plug', 'json', '', build=lambda m: [], probe=lambda m: 'json is fine')]\n"
    )
    env = {"PYTHONPATH": f"{ROOT}{os.pathsep}{plugin}"}
    assert run("in/who.py", cwd=folder, env=env).returncode == 0
    done = run("--strict", "in/who.py", cwd=folder, env=env)
    assert done.returncode == 2
    assert "patch(strict=True) took everything back: plug.one skipped (json is fine)" in done.stderr
    assert run("--strict", "--no-plug", "in/who.py", cwd=folder, env=env).returncode == 0


CODES = {
    "raises": ("def f():\n    raise KeyError('mine')\n\n\nf()\n", 1),
    "from-a-library": ("import json\njson.loads('{')\n", 1),
    "exit-text": ("import sys\nsys.exit('bye')\n", 1),
    "exit-7": ("import sys\nsys.exit(7)\n", 7),
    "exit-none": ("import sys\nprint('x')\nsys.exit()\n", 0),
    "syntax": ("a = (\n", 1),
    "cause": ("try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise OSError('two') from e\n", 1),
    "atexit": ("import atexit\nx = 'alive'\natexit.register(lambda: print(x))\n", 0),
    "thread": ("import threading, time\nx = 'alive'\nthreading.Timer(0.3, lambda: print(x)).start()\n", 0),
}


@pytest.mark.parametrize("name", CODES)
def test_exit_codes_output_and_tracebacks_are_those_of_python(name: str, tmp_path: Path) -> None:
    code, returned = CODES[name]
    (tmp_path / "script.py").write_text(code)
    stock = start(sys.executable, "script.py", cwd=tmp_path)
    found = run("script.py", cwd=tmp_path)
    assert found.returncode == stock.returncode == returned
    assert found.stdout == stock.stdout
    assert found.stderr == stock.stderr
    assert "trl_turbo" not in found.stderr


def test_child_processes_of_multiprocessing_find_the_script(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import multiprocessing\n\n\ndef twice(x):\n    return 2 * x\n\n\n"
        "if __name__ == '__main__':\n    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(twice, [1, 2]))\n"
    )
    done = run("script.py", cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("[2, 4]\n", 0), done.stderr


INTERRUPTED = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests themselves run in the background
os.kill(os.getpid(), signal.SIGINT)
"""


def test_an_interrupt_ends_it_as_it_ends_python(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(INTERRUPTED)
    done = run("script.py", cwd=tmp_path)
    assert done.returncode == 130
    assert "KeyboardInterrupt" in done.stderr
    assert "trl_turbo" not in done.stderr


TRAIN = """
import sys
from pathlib import Path

sys.path.insert(0, {root!r})
from tests.people.trainings import grpo
import json
import logging
from peft import LoraConfig
import trl_turbo

class Heard(logging.Handler):
    records = []
    def emit(self, record):
        self.records.append(record.getMessage())

logging.getLogger("trl_turbo").addHandler(Heard())
logging.getLogger("trl_turbo").setLevel(logging.INFO)
lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
trainer = grpo(Path(sys.argv[1]), Path(sys.argv[2]), 2, peft_config=lora, learning_rate=1e-6)
trainer.train()
rank = trainer.accelerator.process_index
Path(sys.argv[2], f"said-{{rank}}").write_text(json.dumps(Heard.records))
status = trl_turbo.status()["logprob.grpo"].status
Path(sys.argv[2], f"rank-{{rank}}").write_text(f"{{trainer.accelerator.num_processes}} {{status}}")
"""


#: What starts Python with the arguments of a script, or of a module. Accelerate starts several processes on GPUs alone.
LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"],
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}


@pytest.mark.slow
@pytest.mark.trl
@pytest.mark.parametrize(
    ("launcher", "way"), [("accelerate", "module"), ("accelerate", "script"), ("torchrun", "module")]
)
def test_under_a_launcher(launcher: str, way: str, tmp_path: Path) -> None:
    from trl_turbo.demo.tiny import make_model, make_tokenizer, save

    tokenizer = make_tokenizer()
    tiny = save(tmp_path / "tiny", make_model(tokenizer, hidden_size=64), tokenizer)
    (tmp_path / "train.py").write_text(TRAIN.format(root=str(ROOT)))
    (tmp_path / "out").mkdir()
    # What pip writes for `trl-turbo`
    (tmp_path / "trl-turbo").write_text("import sys\nfrom trl_turbo.cli import main\nsys.exit(main())\n")
    entry = ["-m", "trl_turbo.cli"] if way == "module" else ["trl-turbo"]
    command = [sys.executable, "-m", *LAUNCHERS[launcher], *entry, "run", "train.py", str(tiny), "out"]
    env = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = start(*command, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    processes = 2 if launcher == "torchrun" else 1
    for rank in range(processes):
        assert (tmp_path / "out" / f"rank-{rank}").read_text() == f"{processes} applied"
    # One log and one report, from rank 0
    logs = (tmp_path / "out" / "_trl_turbo" / "metrics.jsonl").read_text().splitlines()
    assert len(logs) == 4
    assert (tmp_path / "out" / "_trl_turbo" / "report.html").exists()
    said = [json.loads((tmp_path / "out" / f"said-{rank}").read_text()) for rank in range(processes)]
    assert sum("learning_rate=1e-06 is small for LoRA" in line for line in said[0]) == 1
    assert not any("\n" in line for line in said[0])
    assert said[1:] == [[]] * (processes - 1), "the others are silent"
