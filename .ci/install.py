"""Install with uv what pip would: uv reads none of pip's settings (indexes, folders, constraints), and is told them."""

import ast
import subprocess
import sys

from uv import find_uv_bin

# What decides which files are installed, by names that both have
SHARED = (
    "constraint",
    "extra-index-url",
    "find-links",
    "index-url",
    "no-binary",
    "no-index",
    "only-binary",
    "pre",
    "require-hashes",
    "trusted-host",
)

listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True)
found: dict[str, dict[str, str]] = {":env:": {}, "install": {}, "global": {}}
for line in listed.stdout.splitlines():  # `global.find-links='/opt/wheels'`
    key, value = line.split("=", 1)
    section, _, name = key.rpartition(".")
    if section in found and name in SHARED:
        found[section][name] = ast.literal_eval(value)

options = []
for name, value in {**found["global"], **found["install"], **found[":env:"]}.items():
    if name in ("no-index", "pre", "require-hashes"):
        options += [f"--{name}"] if value.lower() in ("1", "true", "yes", "on") else []
    else:
        options += [f"--{name}={word}" for word in value.split()]

# As pip does, the best version of all places, not the first place's
command = [find_uv_bin(), "pip", "install", "--quiet", "--index-strategy=unsafe-best-match", *options, *sys.argv[1:]]
status = subprocess.run(command).returncode
if status:
    sys.stderr.write(f"uv ended with {status}: installed by pip instead\n")
    _, _, _, python, *rest = sys.argv[1:]  # --cache-dir FOLDER --python PYTHON, and what pip takes as well
    status = subprocess.run([python, "-I", "-m", "pip", "install", "--no-compile", *rest]).returncode
sys.exit(status)
