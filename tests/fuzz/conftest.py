"""Prints what was tried, and writes it where `make fuzz` collects it."""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.fuzz.profiles import TALLY, table


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Of tensors this small; `threads` puts the number back."""
    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter):
    if TALLY:
        terminalreporter.section("attacks")
        terminalreporter.write_line(table(TALLY))


def pytest_sessionfinish():
    out = os.environ.get("GRADSURGERY_FUZZ_OUT")
    if out:
        Path(out).write_text(json.dumps(TALLY))
