"""One hull, one sparse vision transformer and one sparse language model, in about a minute and without training.

python scripts/demo.py
"""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial import ConvexHull

from entreg.adapters import sparsify
from entreg.adapters.language_models import load_language_model
from entreg.adapters.timm_models import vision_model
from entreg.cli import entry_point
from entreg.data.language_tasks import token_windows
from entreg.data.text import corpus
from entreg.data.vision_sets import vision_dataset
from entreg.experiments.timing import interleaved_timings
from entreg.experiments.vision.overlays import overlays
from entreg.geometry import convex_hull
from entreg.records import REFERENCE_ROOT
from entreg.records.figures import PALETTE, new_figure, render
from entreg.sparse import sparsity_from_mapping

RESULTS = REFERENCE_ROOT.parent
PLAN = {"kind": "tokens", "keep": 14, "before_layer": 1, "num_sampled_queries": 12}
"""80 % of the score entries saved on the scenes' 144 patches."""

# The model of configs/model/vit_scenes.yaml, as the committed weights need it.
SCENES_VIT = {
    **{"img_size": 48, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 6, "num_heads": 2},
    **{"num_classes": 10, "class_token": True, "reg_tokens": 3, "global_pool": ""},
}


@entry_point
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=1_000_000, help="points of the hull")
    parser.add_argument("--scenes", type=int, default=200, help="scenes that the vision transformer reads")
    parser.add_argument("--context", type=int, default=2048, help="tokens that the language model reads")
    parser.add_argument("--out", type=Path, default=Path("outputs/demo.png"), help="where the picture goes")
    arguments = parser.parse_args()
    points, vertices, hull = _hull(arguments.points)
    shown, scenes = _scenes(arguments.scenes)
    language = _language(arguments.context)
    told = _recorded()
    print(f"hull: paper {told('geo-hull-speed', 'paper')} with learned rewriting; here {hull}, by our exact algorithm")
    print(f"      records of rewriting: {told('geo-hull-speed', 'here, offline')}: {_verdict(told, 'geo-hull-speed')}")
    print(f"ViT:  paper {told('vit-top1', 'paper')} on ImageNet at 80 % sparsity; here {scenes}")
    print(f"      records after training: {told('vit-top1', 'here, offline')}: {_verdict(told, 'vit-top1')}")
    print(f"LLM:  paper {told('llm-speed', 'paper')} at 70–75 %; here {language}")
    print(f"      records at 8,192 tokens: {told('llm-speed', 'here, offline')}: {_verdict(told, 'llm-speed')}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_bytes(_picture(points, vertices, shown))
    print(f"Picture: {arguments.out}. Evidence: results/tables/claims.md.")


def _hull(count: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Points of a Gaussian, their hull, and how much faster ours is than Qhull."""
    points = np.random.default_rng(0).standard_normal((count, 2))
    times = _seconds({"qhull": lambda: ConvexHull(points), "entreg": lambda: convex_hull(points)})
    return points, np.asarray(convex_hull(points)), f"{times['qhull'] / times['entreg']:.0f}x"


def _scenes(count: int) -> tuple[dict[str, Any], str]:
    """What the sparse path keeps of the first scene, and what it costs a model that was not trained for it."""
    checkpoint = RESULTS / "checkpoints" / "vit-digit-scenes-seed0.safetensors"
    model = vision_model("vit_base_patch16_224", checkpoint=checkpoint, **SCENES_VIT)
    shown = overlays(model, vision_dataset({"name": "digit_scenes", "seed": 0}, "test"), count, [({"plan": "A"}, PLAN)])
    labels = np.array(shown["labels"])
    dense, sparse = (100 * np.mean(np.array(one["answers"]) == labels) for one in (shown, shown["plans"]["A"]))
    with sparsify(model, sparsity_from_mapping(PLAN)) as handle:
        realised = handle.realised_sparsity(torch.zeros(1, 1, 48, 48))
    return shown, f"{dense:.1f} % of digits dense, {sparse:.1f} % at {100 * realised:.0f} %, without training for it"


def _language(context: int) -> str:
    """How much faster SmolLM2 reads an article at 75 % sparsity."""
    loaded = load_language_model("smollm2", dtype="bfloat16")
    tokens = token_windows(corpus("wikipedia_sample"), loaded.tokenizer, context, count=1)

    def read() -> None:
        with torch.inference_mode():
            loaded.model(tokens, logits_to_keep=1)

    def sparse() -> None:
        with sparsify(loaded.model, 0.75):
            read()

    times = _seconds({"dense": read, "sparse": sparse})
    return f"{times['dense'] / times['sparse']:.2f}x over stock SmolLM2 at {context:,} tokens"


def _seconds(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    timings = interleaved_timings(functions, repeats=3, time_budget=10.0, title="demo")
    return {name: timing.median for name, timing in timings.items()}


def _recorded() -> Callable[[str, str], str]:
    """Looks up a claim's column in the table of verdicts of the committed records."""
    with (RESULTS / "tables" / "claims.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    return lambda claim, column: rows[claim][column]


def _verdict(told: Callable[[str, str], str], claim: str) -> str:
    return told(claim, "verdict, offline").upper()


def _picture(points: np.ndarray, vertices: np.ndarray, shown: dict[str, Any]) -> bytes:
    figure, (left, middle, right) = new_figure(1, 3, width=10.0, height=3.6)
    sample, ring = points[:3000], points[np.append(vertices, vertices[0])]
    left.plot(*sample.T, linestyle="", marker=".", markersize=1.5, color=PALETTE[7])
    left.plot(*ring.T, color=PALETTE[0])
    left.set(title=f"the hull of {len(points):,} points: {len(vertices)} of them", aspect="equal")
    image = np.array(shown["image"][0])
    rows, columns = shown["grid"]
    kept = np.zeros(rows * columns)
    kept[shown["plans"]["A"]["kept"][0]] = 1.0
    weight = np.kron(kept.reshape(rows, columns), np.ones((image.shape[0] // rows, image.shape[1] // columns)))
    middle.imshow(image, cmap="gray")
    middle.set_title(f"a scene: {shown['labels'][0]}")
    right.imshow(image * (0.15 + 0.85 * weight), cmap="gray")
    right.set_title(f"the {int(kept.sum())} of {rows * columns} patches that stay")
    for axes in (middle, right):
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
    return render(figure, "demo")["png"]


if __name__ == "__main__":
    main()
