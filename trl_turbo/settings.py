"""Settings of features: words given to ``patch()`` or in the environment, read by the parts that they are for.

A setting switches nothing: it says how a feature that is on does its work. Imports nothing of the package, so that the
engine, which knows no session, can read it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

PREFIX = "TRL_TURBO"
#: What can go wrong in a training and is warned of; ``guard_<name>`` turns one off.
GUARDS = (
    "chat_template",
    "constant_reward",
    "truncated",
    "learning_rate",
    "group_size",
    "logp_drift",
    "context",
)
ON_OFF = ("on", "off")
#: Keyword of ``patch()`` -> the words that it takes, the default first. ``TRL_TURBO_<KEYWORD>`` is its variable.
WORDS: dict[str, tuple[str, ...]] = {
    "rollout_adapter": ("auto", "merged", "served"),
    "rollout_burst": ("auto", "off"),
    "rollout_kernels": ("auto", "off"),
    "rollout_kv_cache_dtype": ("auto", "fp8"),
    **{f"guard_{name}": ON_OFF for name in GUARDS},
}
_SAME = {**dict.fromkeys(("1", "true", "yes"), "on"), **dict.fromkeys(("0", "false", "no"), "off")}

_current: Mapping[str, str] | None = None


def variable(name: str) -> str:
    """Return the setting's name in the environment."""
    return f"{PREFIX}_{name.upper()}"


def resolve(keywords: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """Return every setting: the keyword's word where there is one, else the environment's, else the default.

    Args:
        keywords: Those of ``patch()``; ``None``, or none at all, leaves a setting to the environment.
        environ: The environment.

    Raises:
        ValueError: A word is none that the setting takes.
    """
    found: dict[str, str] = {}
    for name, words in WORDS.items():
        given = keywords.get(name)
        text = environ.get(variable(name), "").strip()
        if words == ON_OFF:
            given = ON_OFF[not given] if isinstance(given, bool) else given
            text = _SAME.get(text.lower(), text)
        if given is not None:
            said, word = f"patch({name}={given!r})", given
        else:
            said, word = f"{variable(name)}={text!r} in the environment", text.lower() or words[0]
        if word not in words:
            raise ValueError(f"{said} is not known; set {', '.join(words[:-1])} or {words[-1]}")
        found[name] = word
    return found


def set_current(values: Mapping[str, str] | None) -> None:
    """Say what :func:`setting` returns; ``None`` leaves it to the environment. Called by the session."""
    global _current
    _current = values


def setting(name: str) -> str:
    """Return the word of a setting: the session's, or the environment's while nothing is patched.

    Raises:
        ValueError: Nothing is patched, and the word in the environment is none that the setting takes.
    """
    current = _current
    return (resolve({}, os.environ) if current is None else current)[name]
