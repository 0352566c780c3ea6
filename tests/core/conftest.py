"""Fake targets and sessions of their own, so that no test touches the session of the process."""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from trl_turbo._plan import Sources
from trl_turbo._session import Session
from trl_turbo.compat import versions
from trl_turbo.hookspecs import hookimpl
from trl_turbo.patching import Patch, Replacement

TARGET = '''
class Base:
    def inherited(self, x: "int" = 1) -> str:
        """Inherited."""
        return "stock"

class Target(Base):
    def method(self, x: "Base" = 1, *, key=None) -> str:
        """A method."""
        return "stock"

    @staticmethod
    def static(x=1):
        return "stock"

    @classmethod
    def klass(cls, x=1):
        return "stock"

    @property
    def prop(self):
        """A property."""
        return "stock"

def function(x=1):
    return "stock"

class Value:
    name = "stock"
'''

KINDS = ("method", "inherited", "static", "klass", "prop", "function", "Value")


def turbo(raw: Any) -> Any:
    """Wrap any kind of raw value so that what it returns shows each layer."""
    if isinstance(raw, property):
        return property(lambda self: f"turbo({raw.fget(self)})")
    if isinstance(raw, type):
        return type(raw.__name__, (raw,), {"name": f"turbo({raw.name})"})
    inner = raw.__func__ if isinstance(raw, (staticmethod, classmethod)) else raw

    def replacement(*args: Any, **kwargs: Any) -> str:
        return f"turbo({inner(*args, **kwargs)})"

    return replacement


def replacements(module: ModuleType, kinds: tuple[str, ...] = KINDS, wrap: Callable[[Any], Any] = turbo) -> list:
    return [Replacement(module if kind in ("function", "Value") else module.Target, kind, wrap) for kind in kinds]


def readings(module: ModuleType, cls: type | None = None) -> dict[str, str]:
    """What each kind of attribute gives, seen through ``cls``."""
    instance = (cls or module.Target)()
    return {
        "method": instance.method(),
        "inherited": instance.inherited(),
        "static": instance.static(),
        "klass": instance.klass(),
        "prop": instance.prop,
        "function": module.function(),
        "Value": module.Value.name,
    }


def snapshot(module: ModuleType) -> dict[str, dict[str, Any]]:
    return {"module": dict(vars(module)), "Base": dict(vars(module.Base)), "Target": dict(vars(module.Target))}


def same(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> bool:
    """Whether two snapshots hold the very same objects."""
    return one.keys() == other.keys() and all(
        one[part].keys() == other[part].keys() and all(one[part][k] is other[part][k] for k in one[part])
        for part in one
    )


class Plugin:
    """A plugin with the given patches, and hooks as attributes."""

    def __init__(self, *patches: Patch) -> None:
        self.patches = list(patches)

    @hookimpl
    def turbo_patches(self, env: Any) -> list[Patch]:
        return self.patches


def make_patch(module: str, name: str = "demo.one", feature: str = "demo", **fields: Any) -> Patch:
    fields.setdefault("build", replacements)
    return Patch(name=name, feature=feature, module=module, summary=f"patches {module}", **fields)


@pytest.fixture
def core() -> SimpleNamespace:
    """The helpers above."""
    return SimpleNamespace(
        KINDS=KINDS,
        Plugin=Plugin,
        make_patch=make_patch,
        readings=readings,
        replacements=replacements,
        same=same,
        snapshot=snapshot,
        turbo=turbo,
    )


@pytest.fixture(autouse=True)
def _quick_and_clean(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    for name in [name for name in os.environ if name.startswith("TRL_TURBO")]:
        monkeypatch.delenv(name)
    if "real_versions" not in request.keywords:
        monkeypatch.setattr(versions, "reported", lambda: {"trl": "1.2.3"})


@pytest.fixture
def new_session() -> Iterator[Callable[..., Any]]:
    """Make sessions; each is unpatched in the end. ``s.patch(**switches)`` takes what ``trl_turbo.patch`` takes."""
    made: list[Session] = []

    def make(*plugins: Any, builtin: tuple[str, ...] = (), entry_points: Any = list, features: Any = ()) -> Any:
        extra = {f"plugin{index}": plugin for index, plugin in enumerate(plugins)}
        session = Session(Sources(builtin=builtin, features=features, entry_points=entry_points, extra=extra))
        made.append(session)

        def patch(*, strict: bool = False, verbose: bool | None = None, **features: Any) -> Any:
            return session.patch(strict=strict, verbose=verbose, features=features)

        return SimpleNamespace(
            session=session, patch=patch, unpatch=session.unpatch, status=session.status, ledger=session._ledger
        )

    yield make
    for session in made:
        session.unpatch()


_serial = itertools.count()


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A module that is not imported yet: ``.name``, ``.path``, ``.load()``, ``.forget()``, ``.rewrite(text)``."""
    package = f"fake_trl_{next(_serial)}"
    name = f"{package}.trainer"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("")
    path = tmp_path / package / "trainer.py"
    path.write_text(TARGET)
    monkeypatch.syspath_prepend(str(tmp_path))
    # A module rewritten within one second would be served from its cached bytecode.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def rewrite(text: str) -> None:
        path.write_text(text)
        importlib.invalidate_caches()

    yield SimpleNamespace(
        name=name,
        package=package,
        path=path,
        load=lambda: importlib.import_module(name),
        forget=lambda: sys.modules.pop(name, None),
        rewrite=rewrite,
        source=TARGET,
    )
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == package]:
        del sys.modules[loaded]
