"""Run records, claims with verdicts, and the tables and figures built from them.

A run ends in one record::

    record = new_record(experiment="geometry/hull", scale="offline", config=config, command=command, seed=0, ...)
    RecordStore("outputs/runs").save(record)

Everything under ``results/`` but ``results/runs/`` is rebuilt from records by ``make tables``
(:func:`entreg.records.build.build_all`); no number is typed by hand.

**Adding tables, figures and verdicts.** Put them in ``tables.py``, ``figures.py`` and
``claims.py`` of ``entreg/experiments/<family>``, or modules whose names end in ``_tables`` and so on; they are found
and imported by themselves, and import neither torch nor model libraries. A builder gets the
records (dictionaries, ordered by id, never of scale ``smoke``) whose experiment's name begins with one of the
prefixes it was registered for; it is not called when there is none, and may return None when the ones there are do
not hold what it shows. It must depend on nothing else: no files, clock or random numbers. ::

    from entreg.records.tables import Table, ratio, register_table, seconds

    # -> results/tables/geometry-hull.md, .csv, .tex
    @register_table("geometry-hull", experiments=("geometry/hull",))
    def hull_table(records: list[dict]) -> Table | None:
        rows = [[row["distribution"], seconds(row["seconds"]), ratio(row["speedup"])]
                for record in records for row in record["rows"]]
        return Table("geometry-hull", "Convex hull, 1,000,000 points", ["points", "time", "speed-up"], rows,
                     notes=["Median of 7 interleaved rounds."])

    from entreg.records.figures import new_figure, method_styles, register_figure

    @register_figure("geometry-law", experiments=("geometry/law",))       # -> results/figures/geometry-law.png, .svg
    def law_figure(records: list[dict]) -> "matplotlib.figure.Figure | None":
        figure, axes = new_figure()
        for method, style in method_styles(["entreg", "Qhull"]).items():
            axes.plot(x, y[method], **style)
        return figure

    from entreg.records.claims import Evidence, register_measure

    @register_measure("geo-hull-speed")                 # the measure's name in claims.yaml, by default the claim's id
    def hull_speed(records: list[dict]) -> Evidence | None:
        ...                                             # called once per scale, with that scale's records only
        return Evidence(value=4.6, interval=(4.1, 5.0), scale="offline", record_ids=[...],
                        reason="classical filter alone: 18x", unit="x", alternative=6.1)

The verdict is not the measure's business: :func:`entreg.records.claims.judge` applies the rule written in
``claims.yaml``. Footers (records, device, commit) are added to tables by themselves. A row that rests on some of its
table's records only is a :class:`~entreg.records.tables.TracedRow`, which names them for the report's readers.
"""

from entreg.records.record import SCALES, config_hash, new_record
from entreg.records.store import REFERENCE_ROOT, USER_ROOT, RecordStore

__all__ = ["REFERENCE_ROOT", "SCALES", "USER_ROOT", "RecordStore", "config_hash", "new_record"]
