"""What a build can refuse: the one error that the code inside the build job raises.

Standard library only, as everything that runs inside the build job (`compile`, `detect`, `slug`, `packs`).
"""

from __future__ import annotations


class BuildRefused(Exception):
    """The source cannot be built; `message` says what is wrong, `hint` what to do, both shown to the pusher."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
