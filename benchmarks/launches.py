"""What a step asks of a GPU: launches, waits and copies, counted on any machine.

    python benchmarks/launches.py [MODEL ...] [--json FILE] [--phases]

A plain step trains on 16 + 16 samples, a step of OrthoGrad has a row for each of the latter. Each
is counted once nothing is new to it. An operation of torch counts as one launch, if it is no view,
a kernel of ours as many as it takes. The host waits for a value, and for a copy to or from it. Its
time, and the most memory, are those of steps whose kernels compute nothing, in those of a plain
step.
"""

import claimed_gpu  # before torch  # isort: skip

import argparse
import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from gpu import Bench, llama
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery import passes, step
from gradsurgery.batch import joined, map_batch
from gradsurgery.bench.models import MODELS, loss
from gradsurgery.capture.factored import FactoredJacobian
from gradsurgery.capture.tape import Tape

# that launch nothing; views are not noted
NOTHING = {"_fused_sdp_choice", "resize_", "set_", "_has_same_storage_numel"}
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal",
    "unique_consecutive", "bincount", "synchronize", "copy_ to host", "copy_ to device",
}  # fmt: skip
FIRST, TIMED = 3, 7  # steps until nothing is new, and those whose host time is taken
# where a step is: what of it is called
PHASES = {
    "forward": (passes.Passes, "_losses"),
    "backward": (Tape, "jacobian"),
    "Gramian": (FactoredJacobian, "_gramian_found"),
    "solve": (step, "solve"),
    "update": (step, "add_update"),
}


class Part(NamedTuple):
    """Of a step, or of a phase of it."""

    launches: int = 0
    waits: int = 0
    to_device: int = 0  # copies from the CPU
    host_ms: float = 0.0

    def plus(self, other: "Part") -> "Part":
        return Part(*(a + b for a, b in zip(self, other, strict=True)))


def read(notes: list[str]) -> dict[str, Part]:
    """The phases of a step, from what it noted."""
    found: dict[str, Part] = {}
    phase, behind = ["else"], set[str]()  # behind: events that the host may have to wait for
    for note in notes:
        kind, _, name = note.partition(" ")
        if kind == "begin":
            phase.append(name)
        elif kind == "end":
            phase.pop()
        elif kind == "record":
            behind.add(name)
        elif kind == "await":
            if name in behind:
                found[phase[-1]] = found.get(phase[-1], Part()).plus(Part(waits=1))
                behind.clear()
        else:
            said = note.removeprefix("aten::")
            masked = said.endswith(" masked")  # where the mask holds is looked for first
            launches, waits = (said not in NOTHING) + masked, (said in WAITS) + masked
            if waits:
                behind.clear()
            part = Part(launches, waits, said.startswith("copy_ to device"))
            found[phase[-1]] = found.get(phase[-1], Part()).plus(part)
    return found


class Phases:
    """Notes where a step is, and how long the host was there."""

    def __init__(self) -> None:
        self.now, self.since, self.ms = ["else"], 0.0, Counter[str]()

    def turn(self, mark: str) -> None:
        claimed_gpu.OPS.note(mark)
        moment = time.perf_counter()
        self.ms[self.now[-1]] += 1e3 * (moment - self.since)
        self.since = moment

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        self.turn(f"begin {name}")
        self.now.append(name)
        try:
            yield
        finally:
            self.turn(f"end {name}")
            self.now.pop()

    def of(self, step: Callable[[], None]) -> dict[str, Part]:
        """What a step asks, by phase."""
        self.ms.clear()
        self.since = time.perf_counter()
        with claimed_gpu.noted() as notes:
            step()
        self.ms["else"] += 1e3 * (time.perf_counter() - self.since)
        found = read(notes)
        return {name: found[name]._replace(host_ms=self.ms[name]) for name in found}

    def __enter__(self) -> "Phases":
        self._patches = ExitStack()
        for name, (owner, function) in PHASES.items():
            served = self._noted(name, getattr(owner, function))
            self._patches.enter_context(patch.object(owner, function, served))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def _noted(self, name: str, serve: Callable) -> Callable:
        @functools.wraps(serve)
        def served(*args: Any, **options: Any) -> Any:
            with self.inside(name):
                return serve(*args, **options)

        return served


class Case(NamedTuple):
    model: nn.Module
    forget: Any
    retain: Any
    loss: Callable
    hollow: bool = False


def of_bench_step(name: str) -> Case:
    build, batches = MODELS[name]
    return Case(build(), batches(16), batches(16), loss)


def token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids).logits[:, :-1].float()
    each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return each.view(len(ids), -1).mean(1)


def gpt2() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    return of_tokens(GPT2LMHeadModel(config), 64)


def of_llama(adapted: bool) -> Case:
    with torch.device("meta"):
        model = llama(Bench("meta", 1))
    model = model.to_empty(device="cuda")
    if adapted:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    return of_tokens(model, 256)


def of_tokens(model: nn.Module, length: int) -> Case:
    ids = torch.randint(0, model.config.vocab_size, (32, length))
    return Case(model, ids[:16], ids[16:], token_losses, hollow=True)


CASES: dict[str, Callable[[], Case]] = {
    "MLP 6.3M": lambda: of_bench_step("MLP 6.3M"),
    "transformer 384x6 T64": lambda: of_bench_step("transformer 384x6 T64"),
    "LoRA 384x6 T64": lambda: of_bench_step("LoRA 384x6 T64"),
    "ResNet-18 GN": lambda: of_bench_step("ResNet-18 GN"),
    "GPT-2": gpt2,
    "Llama 3.2 1B": lambda: of_llama(False),
    "LoRA on Llama 3.2 1B": lambda: of_llama(True),
}


class Step(NamedTuple):
    parts: dict[str, Part]  # by phase
    bytes: int  # at most, with the model


def measured(case: Case) -> tuple[Step, Step]:
    """A plain step, and one of OrthoGrad."""
    model = case.model.to("cuda")
    forget, retain = (map_batch(lambda t: t.to("cuda"), batch) for batch in case[1:3])
    both = joined(forget, retain)
    held = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(held, lr=1e-4)
    surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad())

    def plain() -> None:
        optimizer.zero_grad()
        case.loss(model, both).mean().backward()
        optimizer.step()

    def ours() -> None:
        surgeon.step(forget=forget, retain=retain, loss=case.loss)

    found = []
    standing = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    with Phases() as phases:
        for take in (plain, ours):
            with claimed_gpu.hollow() if case.hollow else nullcontext():
                counts = [phases.of(take) for _ in range(FIRST)][-1]
            with claimed_gpu.hollow():
                times = [phases.of(take) for _ in range(FIRST + TIMED)][FIRST:]
                optimizer.zero_grad()
                with claimed_gpu.weighed() as bytes_more:
                    take()
            parts = {
                name: part._replace(host_ms=median(each[name].host_ms for each in times))
                for name, part in counts.items()
            }
            found.append(Step(parts, standing + bytes_more[0]))
    return found[0], found[1]


def whole(parts: dict[str, Part]) -> Part:
    return functools.reduce(Part.plus, parts.values())


def row(*cells: object) -> None:
    print(f"| {' | '.join(f'{c:.2f}' if isinstance(c, float) else str(c) for c in cells)} |")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", choices=[*CASES, []], help="all of them")
    parser.add_argument("--phases", action="store_true", help="a line for each part of a step")
    parser.add_argument("--triton", action="store_true", help="as where CUDA C++ was not built")
    parser.add_argument("--json", type=Path, help="{model: {plain, step, waits, ...}}")
    options = parser.parse_args()
    if not options.triton:
        claimed_gpu.serve_native()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    row(
        "", "launches: plain", "step", "of plain", "waits", "copies to the GPU",
        "memory: of plain", "host: of plain",
    )  # fmt: skip
    row(*["---"] * 8)
    for name in options.models or CASES:
        torch.manual_seed(0)
        steps = measured(CASES[name]())
        plain, ours = (whole(step.parts) for step in steps)
        of_plain = ours.launches / plain.launches
        times, memory = ours.host_ms / plain.host_ms, steps[1].bytes / steps[0].bytes
        row(name, plain.launches, ours.launches, of_plain, *ours[1:3], memory, times)
        for phase, part in steps[1].parts.items() if options.phases else ():
            row(f"- {phase}", "", part.launches, "", *part[1:3], "", part.host_ms / plain.host_ms)
        found[name] = {
            "plain": plain.launches, "step": ours.launches, "waits": ours.waits,
            "to_device": ours.to_device, "host_of_plain": times,
            "bytes": [step.bytes for step in steps],
            "phases": {phase: part._asdict() for phase, part in steps[1].parts.items()},
        }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
