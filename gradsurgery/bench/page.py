"""report.html: what the numbers say, pictures, tables; one file that needs no other."""

from pathlib import Path

import msgspec
from jinja2 import FileSystemLoader

from gradsurgery.bench import report
from gradsurgery.bench.cases import GROUPS
from gradsurgery.bench.pictures import galleries
from gradsurgery.bench.record import Record
from gradsurgery.unlearn.report import page as pages

PAGES = pages.PAGES.overlay(
    loader=FileSystemLoader([Path(__file__).parent / "templates", pages.TEMPLATES])
)


def page(record: Record, old: Record | None) -> str:
    machine = record.machine_info
    where = machine.processor if machine.device == "CPU" else machine.device
    return PAGES.get_template("bench.html.jinja").render(
        heading=f"What gradsurgery costs on {where}",
        conditions=report.conditions(machine),
        sentences=report.sentences(record, old),
        galleries=list(galleries(record)),
        columns=report.COLUMNS,
        tables=[
            (
                report.HEADINGS[group],
                report.ABOUT[group],
                [row for entry in record.group(group) for row in report.rows(entry)],
            )
            for group in GROUPS
            if record.group(group)
        ],
        slower=report.slower(record),
        slower_heading=report.SLOWER,
        slower_columns=report.LOST,
        change_columns=report.Change._fields,
        missing=report.missing(record),
        old=old and old.datetime[:10],
        changes=report.changes(old, record) if old else [],
        unlike=report.unlike(old, record) if old else [],
        note=report.NOTE,
        facts_of={
            "measured": f"{record.datetime[:16].replace('T', ' ')} UTC, "
            f"in {record.seconds:.0f} seconds",
            **{
                name: f"{value:.4g}" if isinstance(value, float) else value
                for name, value in msgspec.structs.asdict(machine).items()
            },
        },
    )
