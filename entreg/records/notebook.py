"""Tables, figures and verdicts in a notebook, built from the records at hand or there; what has no records says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from entreg.errors import InputError
from entreg.records.claims import judge_all, load_claims, readme_table
from entreg.records.figures import figure_registry, render
from entreg.records.record import told_records
from entreg.records.registry import Registry, discover
from entreg.records.tables import Cell, Table, provenance, table_registry

if TYPE_CHECKING:
    from IPython.display import Image, Markdown
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]


def show_table(records: Records, name: str) -> Markdown:
    """The table ``results/tables/<name>.md`` from these records, or a sentence that it was not run.

    Args:
        records: from :meth:`RecordStore.load_all`; those of scale ``smoke`` do not count.
        name: of a registered table.

    Raises:
        InputError: there is no such table.
    """
    from IPython.display import Markdown

    selected, table = _built(table_registry, records, name)
    if table is None:
        return Markdown(_not_run(table_registry, name))
    notes = "\n".join(f"- {note}" for note in (*table.notes, *provenance(selected, table.record_ids)))
    return Markdown(f"**{table.title}**\n\n{table.body_markdown()}\n{notes}\n")


def show_figure(records: Records, name: str) -> Image | Markdown:
    """The figure ``results/figures/<name>.png`` from these records, or a sentence that it was not run.

    Args:
        records: as for :func:`show_table`.
        name: of a registered figure.

    Raises:
        InputError: there is no such figure.
    """
    from IPython.display import Markdown

    _, figure = _built(figure_registry, records, name)
    return Markdown(_not_run(figure_registry, name)) if figure is None else show_drawing(figure, name)


def show_drawing(figure: Figure, title: str) -> Image:
    """A figure that the notebook drew itself, in the size of those from records.

    Args:
        figure: from :func:`entreg.records.figures.new_figure`.
        title: written into the picture's metadata.
    """
    from IPython.display import Image

    # Half the pixels: sharp on screens of high resolution.
    return Image(render(figure, title)["png"], width=int(figure.get_figwidth() * 80))


def show_rows(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Markdown:
    """A table of what the notebook computed itself, cells as in :class:`entreg.records.tables.Table`."""
    from IPython.display import Markdown

    return Markdown(Table("shown", "", columns, rows).body_markdown())


def show_verdicts(records: Records, prefixes: Sequence[str]) -> Markdown:
    """The rows of the README's claims table whose claims' identifiers begin with a prefix."""
    from IPython.display import Markdown

    discover()
    claims = [claim for claim in load_claims() if claim.id.startswith(tuple(prefixes))]
    return Markdown(readme_table(claims, judge_all(claims, told_records(records))).body_markdown())


def _built(registry: Registry[Any], records: Records, name: str) -> tuple[list[dict[str, Any]], Any]:
    discover()
    entry = registry.get(name)
    if entry is None:
        raise InputError(f"There is no {registry.kind} {name!r}.")
    selected = entry.select(told_records(records))
    return selected, entry.function(selected) if selected else None


def _not_run(registry: Registry[Any], name: str) -> str:
    wanted = " or ".join(f"`{prefix}`" for prefix in registry.get(name).experiments)
    return f"*{registry.kind.capitalize()} {name}: not run; it is made from records of {wanted}.*"
