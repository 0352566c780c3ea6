"""The switches: keywords of ``patch()`` and ``TRL_TURBO_*`` in the environment."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trl_turbo import settings
from trl_turbo.settings import PREFIX

#: What a feature's keyword and variable take beside on and off; each is a way to be on.
WORDS: dict[str, tuple[str, ...]] = {"rollout": ("script",)}
_UNMEASURED: tuple[str, ...] = ("mlp_tiling",)
#: Features that are off unless asked for, and why, in the words of the report.
OPT_IN: dict[str, str] = {
    feature: "off by default until it is measured on a GPU; "
    f"patch({feature}=True) or {PREFIX}_{feature.upper()}=1 turns it on"
    for feature in _UNMEASURED
}
#: Names that no feature may have: keywords of ``patch()`` and switches that mean something else.
RESERVED = frozenset({"strict", "verbose", "plugins", *settings.WORDS})

_WORDS = {**dict.fromkeys(("1", "true", "yes", "on"), True), **dict.fromkeys(("0", "false", "no", "off"), False)}


@dataclass(frozen=True)
class Switch:
    """Whether one feature is on, what says so where it is off, and in which of its ways it is on."""

    on: bool
    reason: str = ""
    word: str = ""


class Switches:
    """What the caller and the environment say, before it is known which features there are.

    Args:
        keywords: The feature keywords of ``patch()`` and those of settings; ``None`` leaves one to the environment.
        environ: The environment.

    Attributes:
        settings: The word of each setting.

    Raises:
        TypeError: A keyword is neither a bool nor ``None`` nor a word that the feature takes.
        ValueError: ``TRL_TURBO`` or ``TRL_TURBO_PLUGINS`` has a value that is neither on nor off, or a setting a word
            that it does not take.
    """

    def __init__(self, keywords: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        self.settings = settings.resolve(keywords, environ)
        keywords = {name: value for name, value in keywords.items() if name not in settings.WORDS}
        for name, value in keywords.items():
            if value is not None and not isinstance(value, bool) and value not in WORDS.get(name, ()):
                others = "".join(f", or {word!r}" for word in WORDS.get(name, ()))
                raise TypeError(f"patch({name}={value!r}) is neither on nor off; pass True or False{others}")
        self.keywords: dict[str, bool] = {name: bool(value) for name, value in keywords.items() if value is not None}
        self._words = {name: value for name, value in keywords.items() if isinstance(value, str)}
        self._named = tuple(keywords)
        self._environ = {name: value for name, value in environ.items() if name.startswith(PREFIX)}
        self.everything = self._read(PREFIX) is not False
        self.plugins = self._read(f"{PREFIX}_PLUGINS") is not False

    def resolve(self, features: Iterable[str]) -> dict[str, Switch]:
        """Return the switch of each feature. ``TRL_TURBO=0`` wins over keywords, keywords over ``TRL_TURBO_<FEATURE>``.

        Raises:
            ValueError: The switch of a feature in the environment has a value that is neither on nor off.
        """
        return {feature: self._switch(feature) for feature in features}

    def unknown(self, features: Collection[str]) -> str | None:
        """Say which keyword names no feature, in one sentence, or return ``None``."""
        for name in self._named:
            if name not in features:
                close = difflib.get_close_matches(name, features, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                return f"patch() has no feature {name!r}; {hint}The features are: {', '.join(sorted(features))}"
        return None

    def misspelt(self, features: Collection[str]) -> tuple[str, ...]:
        """Say which variables of the environment look like a switch and name no feature."""
        known = {f"{PREFIX}_{feature.upper()}" for feature in features} | set(map(settings.variable, settings.WORDS))
        others = sorted(set(self._environ) - known - {PREFIX, f"{PREFIX}_PLUGINS"})
        near = ((name, difflib.get_close_matches(name, known, n=1, cutoff=0.85)) for name in others)
        return tuple(f"{name} in the environment switches nothing; did you mean {m[0]}?" for name, m in near if m)

    def _switch(self, feature: str) -> Switch:
        variable = f"{PREFIX}_{feature.upper()}"
        word = self._environ.get(variable, "").strip().lower()
        word = word if word in WORDS.get(feature, ()) else ""
        said = True if word else self._read(variable)
        if not self.everything:
            return Switch(False, f"{PREFIX}={self._environ[PREFIX]} in the environment turns everything off")
        if feature in self.keywords:
            on = self.keywords[feature]
            return Switch(on, "" if on else f"turned off by patch({feature}=False)", self._words.get(feature, ""))
        if said is False:
            return Switch(False, f"turned off by {variable}={self._environ[variable]} in the environment")
        if feature in OPT_IN and said is None:
            return Switch(False, OPT_IN[feature])
        return Switch(True, word=word)

    def _read(self, variable: str) -> bool | None:
        text = self._environ.get(variable, "").strip()
        if not text:
            return None
        if text.lower() not in _WORDS:
            raise ValueError(f"{variable}={text!r} in the environment is neither on nor off; set it to 1 or 0")
        return _WORDS[text.lower()]
