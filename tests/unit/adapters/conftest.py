"""An adapter directory to read, or to spoil."""

from pathlib import Path

import pytest

from tests.peft_kit import save_peft


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A plain LoRA as PEFT saves it."""
    save_peft(tmp_path)
    return tmp_path
