"""The README's table of steps, of the files that `make bench` and `make gpu` leave.

python scripts/readme_speed.py [--write]
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
MARK = "<!-- speed -->\n"
TORCHJD, VMAP = "TorchJD autogram", "vmap(grad) + QR"
CPU = {
    "MLP 6.3M": "MLP, 6.3 million parameters",
    "transformer 768x2 T16": "transformer, 14 million, 16 tokens",
    "transformer 384x6 T64": "transformer, 11 million, 64 tokens",
    "LoRA 384x6 T64": "LoRA r = 8 on it",
    "ResNet-18 GN": "ResNet-18 with GroupNorm",
}
GPU = {
    "MLP 6.3M": "MLP, 6.3 million parameters",
    "transformer 384x6 T64": "transformer, 11 million, 64 tokens",
    "ResNet-18 GN": "ResNet-18 with GroupNorm",
    "transformer 768x12 T256": "transformer, 85 million, 256 tokens",
    "Llama 3.2 1B's shape, bfloat16, 16 + 16 of 256": "Llama 3.2 1B's shape, 256 tokens",
    "LoRA r = 16 on Llama 3.2 1B's shape, bfloat16, 16 + 16 of 256": "LoRA r = 16 on it",
}


def on_cpu() -> list[str]:
    found = json.loads((RESULTS / "cpu" / "fresh.json").read_text(encoding="utf-8"))
    each = {mark["name"]: mark for mark in found["benchmarks"]}
    lines = []
    for name, model in CPU.items():
        mark = each[f"bench_orthograd_step[{name}]"]
        known = mark["extra_info"]
        seconds = {rival: times["median"] for rival, times in known["rivals"].items()}
        memory = known["memory_ratio"]["plain step"]
        lines.append(line(f"CPU: {model}", seconds, mark["stats"]["median"], memory))
    return lines


def on_gpu() -> list[str]:
    (file,) = (RESULTS / "nvidia-h200").glob("*.json")
    each = {row["work"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    lines = []
    for name, model in GPU.items():
        ours, plain = each[f"OrthoGrad step, {name}"], each[f"plain step, {name}"]
        rivals = {what: each.get(f"{what}, {name}") for what in (TORCHJD, VMAP)}
        seconds = {what: row["seconds"] for what, row in rivals.items() if row is not None}
        memory = ours["extra_bytes"] / plain["extra_bytes"] if "extra_bytes" in ours else None
        seconds["plain step"] = plain["seconds"]
        lines.append(line(f"H200: {model}", seconds, ours["seconds"], memory))
    return lines


def line(model: str, seconds: dict[str, float], ours: float, memory: float | None) -> str:
    plain = seconds["plain step"]
    rivals = [seconds.get(what) for what in (TORCHJD, VMAP)]
    cells = [f"{1e3 * plain:.3g} ms", f"**{ours / plain:.2f}**"]
    cells += ["" if each is None else f"{each / plain:.3g}" for each in rivals]
    return f"| {model} | {' | '.join(cells)} | {'' if memory is None else f'{memory:.2f}'} |"


def table() -> str:
    head = (
        "| OrthoGrad's step, 16 + 16 samples | plain step | ours | TorchJD | vmap and QR | memory |"
    )
    return "\n".join([head, "|---|---|---|---|---|---|", *on_cpu(), *on_gpu()])


def main() -> None:
    if "--write" in sys.argv[1:]:
        before, _, after = README.read_text(encoding="utf-8").split(MARK)
        README.write_text(f"{before}{MARK}{table()}\n{MARK}{after}", encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
