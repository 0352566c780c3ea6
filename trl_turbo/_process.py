"""The one session of the process. Its own module, so that the import system makes it once, whatever the threads."""

from __future__ import annotations

from trl_turbo._plan import Sources
from trl_turbo._session import Session
from trl_turbo.patches import BUILTIN, FEATURES

session = Session(Sources(builtin=BUILTIN, features=tuple(FEATURES)))
