"""What the kernels do on a GPU, beside what it can do: `make gpu` runs the tests, then this.

Writes benchmarks/results/<gpu>/<date>.json and prints a table. Every time is the median of
repetitions measured with device events; every ratio is of times in this run.
"""

import argparse
import copy
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gradsurgery as gs
from gradsurgery.bench.models import MODELS, loss, text, transformer
from gradsurgery.bench.steps import PLAIN, RIVALS, distance, parameters, update_of
from gradsurgery.ops.combine_tokens import combine_tokens
from gradsurgery.ops.formed_gramian import formed_gramian
from gradsurgery.ops.gramian import gramian_of
from gradsurgery.ops.token_gramian import token_gramian
from gradsurgery.ops.weighting import projection_weights

SECONDS = 0.4  # of repetitions, after the first calls, which compile
HALVES = (torch.bfloat16, torch.float32)


class Bench:
    """Times calls on one device and collects rows of the table."""

    def __init__(self, device: str, scale: int) -> None:
        self.device, self.scale = torch.device(device), scale
        self.rows: list[dict[str, Any]] = []
        self.failed: list[str] = []

    def size(self, count: int) -> int:
        return max(1, count // self.scale)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def time(self, call: Callable[[], object]) -> tuple[float, float]:
        """Median seconds of a call, and half of the range that holds half of them."""
        for _ in range(3):
            call()
        start, found = time.perf_counter(), []
        while len(found) < 5 or (time.perf_counter() - start < SECONDS and len(found) < 200):
            found.append(self._once(call))
        low, middle, high = statistics.quantiles(found, n=4)
        return middle, (high - low) / 2

    def _once(self, call: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def add(self, name: str, call: Callable[[], object], **more: Any) -> float:
        seconds, spread = self.time(call)
        self.rows.append({"work": name, "seconds": seconds, "spread": spread, **more})
        print(f"{name:<58} {seconds * 1e3:9.3f} ms ± {spread * 1e3:.3f}", flush=True)
        return seconds

    def measure(self, name: str, call: Callable[[], object], **more: Any) -> float:
        """As `add`, with the peak of memory, and what of it the call allocates."""
        if self.device.type != "cuda":
            return self.add(name, call, **more)
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        seconds = self.add(name, call, **more)
        peak = torch.cuda.max_memory_allocated()
        self.rows[-1] |= {"peak_bytes": peak, "extra_bytes": peak - held}
        return seconds


def error(gram: Tensor, rows: Tensor) -> float:
    """Largest, of some rows' products, in units of their norms."""
    exact = torch.stack([(row.double() * rows[0].double()).sum() for row in rows[:4]])
    norms = torch.stack([row.double().norm() for row in rows[:4]])
    return float(((gram[:4, 0] - exact).abs() / (norms * norms[0])).max())


def copy_rate(bench: Bench, total: int) -> float:
    """Bytes read and written a second."""
    source = bench.randn(total // 4)
    target = torch.empty_like(source)
    name = "copy, device to device"
    return 2 * total / bench.add(name, lambda: target.copy_(source), bytes=2 * total)


def existing_rows(bench: Bench) -> None:
    """Read once: the floor is the device's own copy."""
    total = bench.size(4 << 30)  # bytes
    rate = copy_rate(bench, total)
    for dtype in HALVES:
        for m in (2, 8, 16):
            rows = bench.randn(m, total // (m * dtype.itemsize), dtype=dtype)
            grad, weights = bench.randn(rows.shape[1], dtype=dtype), bench.randn(m).double()
            read = rows.numel() * dtype.itemsize
            name = f"({m}, {rows.shape[1]:.1e}) {str(dtype).removeprefix('torch.')}"
            calls = {
                f"gramian {name}": (lambda: gramian_of([[rows]], False), read),
                f"combine {name}": (lambda: gs.combine(rows, weights), read * (1 + 1 / m)),
                f"project_out {name}": (lambda: gs.project_out(grad, rows), read * (2 + 3 / m)),
            }
            for label, (call, moved) in calls.items():
                seconds = bench.add(label, call, bytes=moved, target="0.80 of the copy's rate")
                bench.rows[-1]["of_copy"] = moved / seconds / rate
            bench.rows[-3]["error"] = error(gramian_of([[rows]], False), rows)
    rows = bench.randn(64, bench.size(1 << 24))
    ours = bench.add("gramian (64, 1.7e7) float32", lambda: gramian_of([[rows]], False))
    bench.rows[-1]["error"] = error(gramian_of([[rows]], False), rows)
    plain = bench.add("torch.matmul(J, J.T) of the same", lambda: rows @ rows.mT)
    bench.rows[-1]["error"] = error((rows @ rows.mT).double(), rows)
    bench.rows[-2] |= {"speedup": plain / ours, "target": "3 x torch.matmul"}
    rows, grad = bench.randn(32, bench.size(10**8)), bench.randn(bench.size(10**8))
    bench.add("project_out (32, 1e8) float32", lambda: gs.project_out(grad, rows))


def factored_rows(bench: Bench) -> None:
    """Beside QR, of fewer values than 2^31: its libraries count in 32 bits."""
    columns = bench.size(5 * 10**7)
    rows, grad = bench.randn(32, columns), bench.randn(columns)
    ours = bench.add("project_out (32, 5e7) float32", lambda: gs.project_out(grad, rows))
    qr = bench.add("torch.linalg.qr of the same", lambda: torch.linalg.qr(rows.mT))
    bench.rows[-2] |= {"speedup": qr / ours, "target": "50 x torch.linalg.qr"}


def weight_gradients(bench: Bench) -> None:
    """The Gramian of one layer's per-sample gradients, in bfloat16."""
    b, side = 16, bench.size(4096)
    index = torch.arange(b, device="cpu")
    for tokens in (64, 256, 1024):
        left, right = (bench.randn(b, tokens, side, dtype=torch.bfloat16) for _ in range(2))
        label = f"B=16, {side} x {side}, T={tokens} bfloat16"
        form = bench.add(f"form per-sample gradients, {label}", lambda: left.mT @ right)

        def stored(left: Tensor = left, right: Tensor = right) -> Tensor:
            rows = (left.mT @ right).flatten(1)
            return rows @ rows.mT

        both = bench.add(f"form and multiply them, {label}", stored)
        direct = bench.add(
            f"formed_gramian, {label}", lambda: formed_gramian([left], [right], [index], b)
        )
        bench.rows[-1] |= {"of_forming": direct / form, "of_both": direct / both}
        by_tokens = bench.add(f"token_gramian, {label}", lambda: token_gramian(left, right))
        bench.rows[-1] |= {"of_forming": by_tokens / form, "of_both": by_tokens / both}
        bench.rows[-1]["target"] = (
            "best of both: 0.6 of forming and multiplying, T=1024: 1.35 of forming"
        )
        weights, out = bench.randn(b), bench.randn(side, side)
        ours = bench.add(
            f"combine_tokens, {label}", lambda: combine_tokens(left, right, weights, out)
        )
        plain = bench.add(
            f"torch.matmul of all tokens, {label}",
            lambda: left.flatten(0, 1).mT @ right.flatten(0, 1),
        )
        bench.rows[-2]["of_matmul"] = ours / plain


def solves(bench: Bench) -> None:
    rows = bench.randn(256, 32, 40).double()
    gram, products = rows @ rows.mT, rows @ bench.randn(40).double()
    bench.add("projection_weights, 256 of 32 x 32", lambda: projection_weights(gram, products))
    bench.rows[-1]["target"] = "1 ms"
    for rule in (gs.UPGrad(), gs.DualProj(), gs.MGDA(), gs.CAGrad(), gs.NashMTL(), gs.PCGrad()):
        name = f"{type(rule).__name__}, 256 of 32 x 32"
        bench.add(name, lambda rule=rule: rule.weights(gram))


def llama(bench: Bench) -> torch.nn.Module:
    """A model of the shape of Llama 3.2 1B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    full = bench.scale == 1
    config = LlamaConfig(
        hidden_size=bench.size(2048),
        intermediate_size=bench.size(8192),
        vocab_size=bench.size(128_256),
        num_hidden_layers=16 if full else 2,
        num_attention_heads=32 if full else 2,
        num_key_value_heads=8 if full else 2,
        tie_word_embeddings=True,
    )
    with bench.device:
        return LlamaForCausalLM(config).to(torch.bfloat16).train()


def steps(bench: Bench) -> None:
    """OrthoGrad beside a plain step, on a model of the shape of Llama 3.2 1B, whole and by LoRA."""
    model = llama(bench)
    length = bench.size(256)
    ids = torch.randint(0, model.config.vocab_size, (32, length), device=bench.device)

    def loss(model: torch.nn.Module, batch: Tensor) -> Tensor:
        logits = model(batch).logits[:, :-1].float()
        each = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        return each.view(len(batch), -1).mean(1)

    label = f"Llama 3.2 1B's shape, bfloat16, 16 + 16 of {length}"
    beside(bench, label, model, ids, loss, "1.20 of time, 1.25 of memory")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:  # no part of a GPU machine's Python: the rest is measured
        print("no peft: the step of LoRA is left out")
        return
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    beside(bench, f"LoRA r = 16 on {label}", adapted, ids, loss, "1.06 of time")


def beside(
    bench: Bench,
    label: str,
    model: torch.nn.Module,
    ids: Tensor,
    loss: Callable[[torch.nn.Module, Tensor], Tensor],
    target: str,
) -> None:
    """A step of OrthoGrad, half of the samples to forget, beside a plain one on all."""
    half = len(ids) // 2
    held = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(held, lr=1e-4)
    surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad())

    def plain() -> None:
        optimizer.zero_grad()
        loss(model, ids).mean().backward()
        optimizer.step()

    def ours() -> None:
        surgeon.step(forget=ids[:half], retain=ids[half:], loss=loss)

    compared(bench, label, plain, ours, target)


def compared(
    bench: Bench, label: str, plain: Callable[[], None], ours: Callable[[], None], target: str
) -> None:
    """Two rows: a plain step, and ours as a multiple of it."""
    times = [
        bench.measure(f"plain step, {label}", plain),
        bench.measure(f"OrthoGrad step, {label}", ours),
    ]
    bench.rows[-1] |= {"of_plain": times[1] / times[0], "target": target}
    if peak := bench.rows[-2].get("peak_bytes"):
        bench.rows[-1]["memory_of_plain"] = bench.rows[-1]["peak_bytes"] / peak


def tofu(bench: Bench) -> None:
    """NPO with OrthoGrad beside NPO without it, on answers as long as TOFU's are."""
    from gradsurgery.language import LogProbs, forget_loss, retain_loss, rule_for

    model, length = llama(bench), bench.size(128)
    batches = []
    for first in (0, 4):
        ids = torch.randint(0, model.config.vocab_size, (4, length), device=bench.device)
        labels = ids.clone()
        labels[:, : length // 2] = -100
        number = torch.arange(first, first + 4, device=bench.device)
        batches.append({"input_ids": ids, "labels": labels, "id": number})
    forget, retain = batches
    npo = forget_loss("npo", reference=LogProbs.of(model, [forget]))
    nll = retain_loss("nll")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    surgeon = gs.Surgeon(model, optimizer, rule_for("orthograd", npo))

    def plain() -> None:
        optimizer.zero_grad()
        (npo(model, forget).mean() + nll(model, retain).mean()).backward()
        optimizer.step()

    def ours() -> None:
        surgeon.add(forget=forget, loss=npo)
        surgeon.add(retain=retain, loss=nll)
        surgeon.step()

    label = f"NPO, Llama 3.2 1B's shape, bfloat16, 4 + 4 of {length}"
    compared(bench, label, plain, ours, "1.25 of time, 1.3 of memory")


def rivals(bench: Bench) -> None:
    """OrthoGrad in float32 beside a plain step, TorchJD, and QR of torch.func's gradients."""
    if importlib.util.find_spec("torchjd") is None:
        print("no torchjd: the rivals' steps are left out")
        return
    large = {"transformer 768x12 T256": (lambda: transformer(768, 12, 128, 256), text(256))}
    small = {name: MODELS[name] for name in ("ResNet-18 GN", "transformer 384x6 T64", "MLP 6.3M")}
    for name, (build, batches) in (small | large).items():
        model = build().to(bench.device)
        forget, retain = (
            tuple(t.to(bench.device) for t in batches(bench.size(16))) for _ in range(2)
        )
        copies = {rival: copy.deepcopy(model) for rival in RIVALS}
        optimizer = torch.optim.SGD(parameters(model), lr=0.0)
        surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad())

        def ours(
            surgeon: gs.Surgeon = surgeon,
            forget: tuple[Tensor, ...] = forget,
            retain: tuple[Tensor, ...] = retain,
        ) -> None:
            surgeon.step(forget=forget, retain=retain, loss=loss)

        update = update_of(ours, model, optimizer)
        seconds = bench.measure(f"OrthoGrad step, {name}", ours)
        row = bench.rows[-1]
        for rival, other in copies.items():
            optimizer = torch.optim.SGD(parameters(other), lr=0.0)
            step = RIVALS[rival](other, optimizer, forget, retain)
            apart = (
                {}
                if rival == PLAIN
                else {"apart": distance(update_of(step, other, optimizer), update)}
            )
            row[f"faster than {rival}"] = bench.measure(f"{rival}, {name}", step, **apart) / seconds


PARTS = {
    part.__name__: part
    for part in (existing_rows, weight_gradients, solves, steps, tofu, rivals, factored_rows)
}


def facts(device: torch.device) -> dict[str, Any]:
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": name, "torch": torch.__version__, "cuda": torch.version.cuda,
        "triton": __import__("triton").__version__, "commit": git.stdout.strip() or "unknown",
        "date": date.today().isoformat(),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    columns = ["work", "ms", "measured", "target"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        known = {"work", "seconds", "spread", "bytes", "target", "peak_bytes", "extra_bytes"}
        measured = ", ".join(f"{k} {v:.3g}" for k, v in row.items() if k not in known)
        cells = [row["work"], f"{row['seconds'] * 1e3:.3f}", measured, row.get("target", "")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    # [] for none: argparse holds what is absent against the choices, too
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to measure; all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", type=int, default=1, help="divides sizes: a trial of the script")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    bench = Bench(options.device, options.scale)
    found = facts(bench.device)
    folder = options.out / found["device"].replace(" ", "-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{found['date']}.json"
    for part in (PARTS[name] for name in options.parts or PARTS):
        try:
            part(bench)
        except Exception as failure:  # the other parts are still wanted
            print(f"{part.__name__} failed: {failure}")
            bench.failed.append(part.__name__)
        # what a limit cuts off is kept
        path.write_text(json.dumps({**found, "rows": bench.rows}, indent=1))
    (folder / "table.md").write_text(table(bench.rows) + "\n")
    print(table(bench.rows))
    sys.exit(f"failed: {', '.join(bench.failed)}" if bench.failed else 0)


if __name__ == "__main__":
    main()
