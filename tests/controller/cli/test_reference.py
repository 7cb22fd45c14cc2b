from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_page_is_current() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "controller.cli.reference"], capture_output=True, text=True, check=True, timeout=30
    )
    page = Path(__file__).parents[3] / "docs" / "cli.md"
    assert page.read_text() == done.stdout, "python -m controller.cli.reference > docs/cli.md"
