"""Lines of text for what `check` found."""


def mib(size: int) -> str:
    return f"{size / 2**20:.1f}" if size < 100 * 2**20 else f"{size / 2**20:.0f}"


def amount(count: int) -> str:
    """Bytes, as people speak of them."""
    unit = next(unit for unit in ("GB", "MB", "kB") if count >= UNITS[unit] or unit == "kB")
    return f"{count / UNITS[unit]:.3g} {unit}"


UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3}


def folded(items: dict[str, tuple[str, ...]]) -> list[str]:
    """A line for all names that differ in numbers only, if they come with the same values."""
    found: dict[tuple, list[list[str]]] = {}
    for name, values in items.items():
        parts = name.split(".")
        words = tuple("" if part.isdigit() else part for part in parts)
        found.setdefault((words, values), []).append(parts)
    lines = []
    for (_, values), names in found.items():
        columns = [set(column) for column in zip(*names, strict=True)]
        name = ".".join(column.pop() if len(column) == 1 else "*" for column in columns)
        lines.append((name, *values, f"x {len(names)}" if len(names) > 1 else ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def table(paths: dict[str, str], shapes: dict[str, list[int]]) -> list[str]:
    return folded({name: (str(shapes[name]), path) for name, path in paths.items()})
