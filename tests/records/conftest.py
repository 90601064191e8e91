"""The report built from the committed records, once for all its tests."""

import pytest

from entreg.records import REFERENCE_ROOT, registry
from entreg.records.build import build_all
from entreg.records.figures import figure_registry


@pytest.fixture(scope="session")
def reference_report(reference_records, tmp_path_factory):
    """Folder with the report of the committed records, whole but for the drawing of most figures."""
    folder = tmp_path_factory.mktemp("report") / "out"
    registry.discover()
    with pytest.MonkeyPatch.context() as patch:
        # Two figures stand for all: drawing takes the longest.
        kept = {name: figure_registry.get(name) for name in ("vision-settings", "llm-support")}
        patch.setattr(figure_registry, "_entries", kept)
        build_all(reference_records, folder, records_root=REFERENCE_ROOT)
    return folder
