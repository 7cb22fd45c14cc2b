from __future__ import annotations

import pytest

from buildpack.errors import PushRefused
from buildpack.push import Wanted, decide

NONE, A, B = "0" * 40, "a" * 40, "b" * 40


def test_main_or_master_deploys_with_tags_and_other_branches_along() -> None:
    assert decide([f"{NONE} {A} refs/heads/main"]) == Wanted(A, "main")
    assert decide([f"{B} {A} refs/heads/master", f"{NONE} {B} refs/tags/v1"]) == Wanted(A, "master")
    assert decide([f"{NONE} {B} refs/heads/feature", f"{NONE} {A} refs/heads/main"]) == Wanted(A, "main")
    assert decide([f"{NONE} {A} refs/heads/main", f"{NONE} {A} refs/heads/master"]).commit == A


@pytest.mark.parametrize(
    ("updates", "words"),
    [
        ([], "must include a change"),
        ([f"{NONE} {A} refs/heads/feature"], "must include a change"),
        ([f"{NONE} {A} refs/tags/main"], "must include a change"),
        ([f"{NONE} {A} refs/heads/x/main"], "must include a change"),
        ([f"{A} {NONE} refs/heads/main"], "cannot be removed"),
        ([f"{NONE} {A} refs/heads/main", f"{NONE} {B} refs/heads/master"], "different commits"),
        ([f"{NONE} {A} refs/heads/main", f"{NONE} {B} refs/tags/{'d/' * 1500}x"], "more than 255 letters"),
    ],
)
def test_anything_else_is_refused(updates: list[str], words: str) -> None:
    with pytest.raises(PushRefused, match=words):
        decide(updates)
