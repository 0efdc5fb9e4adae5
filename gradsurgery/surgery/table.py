"""The rules as a table, for the command line and docs/rules.md."""

from gradsurgery.surgery import RULES

HEAD = ("rule", "update", "rows told apart", "options", "holds", "source")


def rows() -> list[tuple[str, ...]]:
    """One for each rule, in the order of `HEAD`."""
    return [
        (
            rule.__name__,
            rule.formula,
            ", ".join(rule.roles),
            ", ".join(rule.options()),
            ", ".join(sorted(rule.properties)),
            rule.paper,
        )
        for rule in RULES.values()
    ]


def markdown() -> str:
    lines = [HEAD, ("---",) * len(HEAD), *(_escaped(row) for row in rows())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _escaped(row: tuple[str, ...]) -> tuple[str, ...]:
    name, formula, *rest = row
    return (f"`{name}`", formula.replace("|", "\\|"), *rest)


def text() -> str:
    """Name on the command line, update, and properties, in columns."""
    names = list(RULES)
    wide = max(map(len, names))
    longest = max(len(row[1]) for row in rows())
    return "\n".join(
        f"{name:<{wide}}  {row[1]:<{longest}}  {row[4]}".rstrip()
        for name, row in zip(names, rows(), strict=True)
    )
