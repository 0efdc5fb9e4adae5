"""`make fuzz SEEDS=n FIRST=k`: every test here under the seeds k to k + n - 1, and their count."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.fuzz.profiles import table

BUILD = Path("build/fuzz")


def main(first, seeds, effort, arguments):
    """0 if nothing failed; build/fuzz/summary.json and, of each seed, the log of its tests."""
    BUILD.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    total, failed = {}, []
    for seed in range(first, first + seeds):
        counts, log = BUILD / "seed.json", BUILD / f"seed{seed}.log"
        counts.unlink(missing_ok=True)
        environment = {
            **os.environ,
            "GRADSURGERY_FUZZ": str(effort),
            "GRADSURGERY_FUZZ_SEED": str(seed),
            "GRADSURGERY_FUZZ_OUT": str(counts),
        }
        call = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/fuzz"]
        with log.open("w") as out:
            done = subprocess.run(
                [*call, *arguments],
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        if done.returncode:
            failed.append(seed)
        if counts.exists():
            for kind, count in json.loads(counts.read_text()).items():
                total.setdefault(kind, Counter()).update(count)
        summary = {
            "commit": commit.stdout.strip(),
            "effort": effort,
            "seeds": [first, seed],
            "seeds with failures": failed,
            "kinds": total,
        }
        (BUILD / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(f"seed {seed}: {'failures, see ' + str(log) if done.returncode else 'nothing'}")
    print(table(total))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(*map(int, sys.argv[1:4]), sys.argv[4:]))
