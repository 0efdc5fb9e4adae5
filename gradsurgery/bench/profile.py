"""Traces of a step, for people who want to see where the time goes."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from gradsurgery.bench.cases import OURS, Case
from gradsurgery.bench.steps import PLAIN

STEPS = 3  # before the one that is traced


def traces(cases: list[Case], device: torch.device, out: Path) -> Iterator[Path]:
    """Of ours and of the plain step of each model, a Chrome trace and a table of operations.

    chrome://tracing and ui.perfetto.dev open the .json files; the .txt ones are for reading.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    folder = out / "traces"
    folder.mkdir()
    for case in cases:
        contenders = case.make(device).contenders
        for name in (OURS, PLAIN):
            call = contenders[name].call
            for _ in range(STEPS):
                call()
            with profile(activities=activities, record_shapes=True) as seen:
                call()
            path = folder / f"{re.sub(r'[^0-9A-Za-z]+', '-', f'{case.name} {name}')}.json"
            seen.export_chrome_trace(str(path))
            by = f"self_{device.type}_time_total"
            table = seen.key_averages().table(sort_by=by, row_limit=30)
            path.with_suffix(".txt").write_text(table, encoding="utf-8")
            yield path
