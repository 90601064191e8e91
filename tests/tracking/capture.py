"""`make dashboard` as a user sees it: two small runs, the dashboard in a terminal of its own, its screen as a picture.

python -m tests.tracking.capture docs/assets/dashboard.svg
"""

import io
import itertools
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

import pexpect
import pyte
import torch
import yaml

from entreg.adapters import probe
from entreg.cli import CONFIGS
from entreg.tracking import tracked, tracker_settings_from_mapping
from entreg.tracking.attention import AttentionWatch
from entreg.training.loop import TrainingSettings, train
from entreg.training.penalties import Penalties, penalty_from_mapping
from entreg.training.vision import VisionObjective
from tests.tracking.vit import Images, transformer

ROOT = Path(__file__).parents[2]
COLUMNS, LINES = 128, 38
# Of rich's SVGs.
_CHARACTER_WIDTH = 12.2
SETTINGS = {"steps": 60, "batch_size": 8, "learning_rate": 0.003, "warmup_steps": 5, "log_every": 2}
RUNS = {"plain": ("20260101_120000", "91b0c5a7d2e4"), "key_entropy": ("20260101_120500", "c04f7e21b8a6")}


def make_runs(folder):
    """The same training without and with an entropy penalty, tracked offline in ``<folder>/outputs``."""
    torch.set_num_threads(1)
    tracker = tracker_settings_from_mapping(
        {"kind": "wandb", "directory": f"{folder}/outputs", "attention_every": 6, "attention_items": 8}
    )
    for method, (_, run_id) in RUNS.items():
        regularizer = yaml.safe_load((CONFIGS / "regularizer" / f"{method}.yaml".replace("plain", "none")).read_text())
        penalties = {name: penalty_from_mapping(one) for name, one in (regularizer.get("penalties") or {}).items()}
        model, data = transformer(), Images(64)
        captures = probe(model)
        identity = {"config": {"method": method, "seed": 0}, "experiment": "vit/example", "group": "vit/example"}
        with tracked(tracker, **identity, name=f"{method} seed 0", run_id=run_id, tags=[method]) as one:
            train(
                model,
                VisionObjective(Penalties(penalties), captures=captures),
                data,
                TrainingSettings(**SETTINGS),
                f"{folder}/{method}",
                device="cpu",
                tracker=one,
                watch=AttentionWatch(one, tracker, lambda model, data=data: model(data.images[:8])),
            )
        captures.remove()
    sys.modules["wandb"].teardown()
    # Folders carry the time of their run's beginning, which would differ from picture to picture.
    for began, run_id in RUNS.values():
        (made,) = Path(folder, "outputs", "wandb").glob(f"offline-run-*-{run_id}")
        made.rename(made.with_name(f"offline-run-{began}-{run_id}"))


class Terminal:
    """A command in a terminal that nobody looks at."""

    def __init__(self, command, environment):
        self.screen = pyte.Screen(COLUMNS, LINES)
        self._stream = pyte.Stream(self.screen)
        self.process = pexpect.spawn(
            command[0],
            command[1:],
            dimensions=(LINES, COLUMNS),
            encoding="utf-8",
            cwd=str(ROOT),
            env={**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", **environment},
        )

    @property
    def text(self):
        return "\n".join(line.rstrip() for line in self.screen.display)

    def wait(self, *words, timeout=60):
        """Until all words are on the screen and it is still."""
        end, seen = time.monotonic() + timeout, None
        while time.monotonic() < end:
            try:
                self._stream.feed(self.process.read_nonblocking(65536, timeout=1.0))
            except pexpect.TIMEOUT:
                if seen == self.text and all(word in self.text for word in words):
                    return
                seen = self.text
        raise AssertionError(f"{words} did not appear on the screen:\n{self.text}")

    def press(self, keys):
        self.process.send(keys)

    def leave(self):
        """Press q; gives the exit status."""
        self.press("q")
        self.process.expect(pexpect.EOF, timeout=20)
        self.process.close()
        return self.process.exitstatus


def dashboard(folder):
    """The terminal with `make dashboard` of the runs in ``<folder>/outputs``, both selected."""
    home = Path(folder, "home")
    home.mkdir(exist_ok=True)
    # The overview at the side would also show the machine.
    (home / "wandb-leet.json").write_text('{"workspace_overview_visible": false}')
    environment = {"HOME": str(home), "WANDB_CONFIG_DIR": str(home), "TRACKED": f"{folder}/outputs"}
    terminal = Terminal(["make", "--no-print-directory", "--silent", "dashboard"], environment)
    newest = f"▶ offline-run-{'-'.join(RUNS['key_entropy'])}"
    terminal.wait("Runs [2 items]", newest, "row_support")
    # Down, and select that run, too.
    terminal.press("\x1b[B")
    terminal.wait(newest)
    terminal.press(" ")
    terminal.wait(newest, f"● offline-run-{'-'.join(RUNS['plain'])}")
    return terminal


def shown(terminal, folder):
    """The screen's text, the folder as in a checkout."""
    return re.sub(
        re.escape(f"{folder}/outputs/wandb"), lambda found: "outputs/wandb".ljust(len(found[0])), terminal.text
    )


def picture(terminal, folder):
    """The screen as an SVG."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for row, line in enumerate(shown(terminal, folder).split("\n")):
        cells = [(_style(terminal.screen.buffer[row][place]), one) for place, one in enumerate(line.ljust(COLUMNS))]
        text = Text()
        for style, same in itertools.groupby(cells, key=lambda cell: cell[0]):
            text.append("".join(one for _, one in same), style=style)
        console.print(text, no_wrap=True, overflow="crop")
    drawn = console.export_svg(title="make dashboard", unique_id="dashboard")
    # Its fonts would come from the network.
    return re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)


def _style(cell):
    from rich.style import Style

    def color(name):
        if name == "default":
            return None
        return f"#{name}" if re.fullmatch("[0-9a-f]{6}", name) else {"brown": "yellow"}.get(name, name)

    return Style(
        color=color(cell.fg), bgcolor=color(cell.bg), bold=cell.bold, reverse=cell.reverse, underline=cell.underscore
    )


def text_of(drawing):
    """The lines of text in such an SVG."""
    lines = {}
    for element in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text"):
        place = re.search(r"line-(\d+)", element.get("clip-path") or "")
        if place:
            line = lines.setdefault(int(place[1]), [" "] * COLUMNS)
            start = round(float(element.get("x")) / _CHARACTER_WIDTH)
            words = element.text.replace("\xa0", " ")
            line[start : start + len(words)] = words
    return ["".join(lines.get(number, "")).rstrip() for number in range(max(lines) + 1)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        make_runs(scratch)
        seen = dashboard(scratch)
        Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
        Path(sys.argv[1]).write_text(picture(seen, scratch), encoding="utf-8")
        print(shown(seen, scratch))
        seen.leave()
