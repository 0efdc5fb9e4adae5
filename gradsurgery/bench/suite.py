"""What pytest runs: a benchmark for each case that `plugin` is given."""

from collections.abc import Callable

from gradsurgery.bench.cases import Case


def bench(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
