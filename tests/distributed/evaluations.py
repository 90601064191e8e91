"""Every evaluation on tiny models; as a program, by one of several processes, into a file of its own.

python -m tests.distributed.evaluations FOLDER
"""

import json
import sys
from pathlib import Path
from unittest import mock

import torch

from entreg import distributed
from entreg.adapters import vision_model
from entreg.adapters.language_models import random_language_model
from entreg.data.language_tasks import NeedleTask, SummaryTask
from entreg.experiments.language import evaluation as language_evaluation
from entreg.experiments.language.evaluation import Task
from entreg.experiments.language.measures import greedy_continuation
from entreg.experiments.vision import evaluation as vision_evaluation
from tests.experiments.language.test_evaluation import TINY, Words, windows
from tests.experiments.language.test_evaluation import evaluation as language_settings
from tests.experiments.vision.test_evaluation import Images
from tests.experiments.vision.test_evaluation import evaluation as vision_settings

SIZES = (1, 3, 5)
"""Of the data sets; two processes and batches of two: none, one or both have something to do, evenly and not."""


def images(size, seed=0):
    """So many images with labels and masks of different sizes."""
    data = Images()
    data.images = torch.randn(size, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
    data.labels, data.masks = data.labels[:size], data.masks[:size].clone()
    for index in range(size):
        data.masks[index, : 4 * (index % 4)] = False
    return data


def vision(size):
    """Accuracy, calibration, overlap with masks, budgets by entropy and robustness, with sampled queries."""
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = vision_model("vit_base_patch16_224", num_classes=3, **options).eval()
    tokens = {"kind": "tokens", "before_layer": 1, "num_sampled_queries": 4, "score": "mixed"}
    settings = vision_settings(
        splits=["validation", "test"],
        batch_size=2,
        plans={
            "kept": {**tokens, "keep": 4},
            "columns": {"kind": "columns", "sparsity": 0.5, "score": "magnitude"},
            "budgets": {**tokens, "entropy_budget": {"multiplier": 1.0}, "levels": [0.3]},
        },
        localisation={"scores": ["mixed", "received"], "coverage": 0.25},
        robustness={"severities": [2], "extra": False, "sparsity": {**tokens, "keep": 4}},
    )

    # What stands for corrupted images is another draw for each kind.
    def corrupted(data, name, severity, limit):
        return images(size, len(name) + severity)

    datasets = {"validation": images(size, 1), "test": images(size, 2)}
    with mock.patch.object(vision_evaluation, "corrupted_dataset", corrupted):
        return vision_evaluation.evaluate_everything(model, datasets, settings, data={})


def language(size):
    """Perplexity, copies, needles and summaries, dense and sparse in prefill and decode."""
    model = random_language_model("smollm2_135m", TINY).model
    words, needles, articles = Words(), [], []
    for seed in range(size):
        text = windows(1, 240 + seed, seed)[0]
        own = greedy_continuation(model, text, 3)
        # Some answers are what the model writes, so that there is something to find.
        needles.append(NeedleTask(text, own if seed % 3 != 1 else windows(1, 3, seed)[0], seed % 2))
        articles.append(SummaryTask(text, words.decode(own[: 1 + seed % 3], True)))
    tasks = [
        Task("perplexity", "test", 256, windows(size, 256), scored=(255,) * size),
        Task("copy", "test", 256, windows(size, 256, 1), scored=tuple(range(20, 20 + size))),
        Task("needle", "test", 256, needles),
        Task("summary", "test", 256, articles, new_tokens=4),
    ]
    plan = {"kind": "decoder", "selection": "sampled", "block_size": 16, "decode_sparsity": 0.5, "levels": [0.5]}
    _, rows = language_evaluation.evaluate_everything(model, words, tasks, language_settings(plans={"sampled": plan}))
    for row in rows:
        del row["seconds"]
    return rows


def everything():
    """All results as JSON, which keeps every bit of a number."""
    return json.dumps({size: [vision(size), language(size)] for size in SIZES}, sort_keys=True)


if __name__ == "__main__":
    with distributed.joined("cpu"):
        (Path(sys.argv[1]) / f"{distributed.my_turns(2)[0]}.json").write_text(everything())
