"""How much is drawn, and the count of what became of it."""

import os
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from random import Random

import hypothesis.core
from hypothesis import HealthCheck, Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase

import gradsurgery as gs

# times the examples of `make test`; with 1 the draws are the same in every run
EFFORT = int(os.environ.get("GRADSURGERY_FUZZ", "1"))
EXAMPLES = Path("build/fuzz/examples")

if "GRADSURGERY_FUZZ_SEED" in os.environ:
    # pytest's --hypothesis-seed would switch the examples kept off
    hypothesis.core.threadlocal._hypothesis_global_random = Random(
        os.environ["GRADSURGERY_FUZZ_SEED"]
    )


def examples(quick):
    """Settings of a test that draws `quick` examples in `make test`."""
    return settings(
        max_examples=quick * EFFORT,
        derandomize=EFFORT == 1,
        database=None if EFFORT == 1 else DirectoryBasedExampleDatabase(EXAMPLES),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[phase for phase in Phase if phase is not Phase.explain],
        print_blob=EFFORT > 1,
    )


TALLY: dict[str, Counter] = {}
_failing: set[str] = set()  # tests that shrink what they found: no more is counted


@contextmanager
def attack(kind, *, may_refuse=True):
    """Count an example: tried, refused where its body raises InputError, failed by any other error.

    A refusal has to name something: it is one line of some words. Where it makes no sense to
    refuse, with may_refuse=False, it is a failure.
    """
    test = os.environ.get("PYTEST_CURRENT_TEST", "")
    count = Counter() if test in _failing else TALLY.setdefault(kind, Counter())
    count["tried"] += 1
    try:
        yield count
    except BaseException as error:
        if may_refuse and isinstance(error, gs.InputError) and _names_something(str(error)):
            count["refused"] += 1
            return
        count["failed"] += 1
        _failing.add(test)
        raise


def _names_something(said):
    return len(said.split()) > 3 and "\n" not in said and len(said) < 2000


def table(tally):
    """Tried, refused and failed, a line a kind."""
    lines = ["kind                               tried  refused  failed"]
    for kind, count in sorted(tally.items()):
        figures = (count.get(name, 0) for name in ("tried", "refused", "failed"))
        tried, refused, failed = figures
        lines.append(f"{kind:<32} {tried:7d} {refused:8d} {failed:7d}")
    return "\n".join(lines)
