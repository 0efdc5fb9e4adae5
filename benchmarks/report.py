"""A table of pytest-benchmark's JSON: python benchmarks/report.py RESULT.json..."""

import json
import sys
from pathlib import Path

from gradsurgery.bench.report import ratio
from gradsurgery.bench.report import table as rows_of

COLUMNS = ("work", "ours", "GB/s", "error", "extra memory", "against", "target")


def row(bench):
    info, stats = bench["extra_info"], bench["stats"]
    against, verdict = [], []
    for name, rival in info["rivals"].items():
        against.append(f"{name} {ratio(rival['ratio'])}")
        if name in info["target"]:
            target = info["target"][name]
            met = rival["ratio"] >= target
            verdict.append(f"{name} {ratio(target)}: {'met' if met else '**missed**'}")
    for name, share in info.get("memory_target", {}).items():
        if name in info["memory_ratio"]:
            got = info["memory_ratio"][name]
            met = f"{'met' if got <= share else '**missed**'} ({got:.2g})"
            verdict.append(f"{share:.2f} of the memory of {name}: {met}")
    if "sent" in info:  # by several processes, in a step
        against.append(
            "sent: " + ", ".join(f"{k} {v / 1e6:.4g} MB" for k, v in info["sent"].items())
        )
    memory = info["extra_memory"]
    return (
        bench["name"].removeprefix("bench_").replace("[", " ").replace("]", ""),
        f"{1e3 * stats['median']:.3g} ms ± {1e3 * stats['iqr']:.2g}",
        f"{info['gbps']:.0f}",
        f"{info['error']:.0e}",
        "" if memory is None else f"{max(memory, 0) / 2**20:.1f} MiB",
        "; ".join(against),
        "; ".join(verdict),
    )


def table(path):
    data = json.loads(Path(path).read_text())
    machine, commit = data["machine_info"], data["commit_info"]
    cpu = machine["cpu"].get("brand_raw", machine["processor"])
    conditions = (
        f"{cpu}, {machine['isa']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{machine['compiler']}; copy {machine['copy_gbps']:.0f} GB/s, read "
        f"{machine['read_gbps']:.0f} GB/s; memory {machine['memory']}; commit {commit['id'][:10]}"
        f"{' with changes' if commit['dirty'] else ''}, {data['datetime'][:10]}"
    )
    return f"{conditions}\n\n{rows_of(COLUMNS, map(row, data['benchmarks']))}"


if __name__ == "__main__":
    print("\n\n".join(table(path) for path in sys.argv[1:]))
