"""What is installed, and whether it is in range; imports none of what it asks about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

#: Shown first in the report and given to plugins, in this order.
REPORTED = ("trl", "transformers", "torch", "peft", "accelerate", "triton", "vllm")


def installed(distribution: str) -> str | None:
    """Return the installed version of a distribution from its metadata, without importing it; ``None`` where absent."""
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except (metadata.PackageNotFoundError, ValueError):  # ValueError: an empty name
        return None


def reported() -> dict[str, str | None]:
    """Return the versions that the report shows."""
    return {name: installed(name) for name in REPORTED}


def unmet(requires: Iterable[str], versions: Mapping[str, str | None] | None = None) -> str | None:
    """Say which requirement does not hold.

    Args:
        requires: PEP 508 requirements; one whose marker excludes this machine holds. A development version counts as
            what it leads to, since TRL is often installed from its main branch.
        versions: Versions already known, by distribution name; others are looked up.

    Returns:
        ``None`` where all hold, else a sentence that names the requirement and what was found.

    Raises:
        ValueError: A requirement is not PEP 508.
    """
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.version import InvalidVersion, Version

    for text in requires:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            message = f"{text!r} is not a PEP 508 requirement ({error}); write it as 'trl>=0.29.1,<2'"
            raise ValueError(message) from error
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        name, wanted = requirement.name, f"{requirement.name}{requirement.specifier}"
        found = versions[name] if versions is not None and name in versions else installed(name)
        if found is None:
            return f"it needs {wanted}, and {name} is not installed"
        try:
            version = Version(found)
        except InvalidVersion:
            return f"it needs {wanted}, and the installed {name} calls itself {found!r}, which is no version"
        if not requirement.specifier.contains(version, prereleases=True):
            return f"it needs {wanted}, and {name} {found} is installed"
    return None
