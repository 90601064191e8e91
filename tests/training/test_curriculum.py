"""The curriculum of the cells against a hand-written loop, brute force, and a run that was killed."""

import json
import math

import pytest
import torch

from entreg.adapters import vision_model
from entreg.errors import ConfigError
from entreg.training.curriculum import CellCurriculum, CurriculumSettings
from entreg.training.loop import TrainingSettings, train
from entreg.training.penalties import Penalties
from entreg.training.vision import VisionObjective

# Token of the class or of a register, then the 16 patches of a 4 x 4 grid row by row: the cell of each.
CELLS = [0, 1, 2, 3, *[0, 0, 1, 1] * 2, *[2, 2, 3, 3] * 2]


def tiny_model(reg_tokens=3, img_size=16):
    torch.manual_seed(0)
    return vision_model(
        "vit_base_patch16_224",
        img_size=img_size,
        patch_size=4,
        in_chans=1,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=5,
        reg_tokens=reg_tokens,
        global_pool="",
    )


class Scenes:
    """Twelve fixed images with an answer for each of four cells."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(12, 1, 16, 16, generator=generator)
        self.labels = torch.randint(5, (12, 4), generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"images": self.images[index].clone(), "labels": self.labels[index]}


def test_closeness_follows_the_loop_written_by_hand():
    settings = CurriculumSettings(
        threshold=1.0, start=0.01, factor=2.0, switch=0.1, increment=0.3, smoothing=0.5, code=0.0
    )
    losses = [3.0, 1.2, 0.4, 0.6, 0.5, 2.6, 0.1, 0.2, 0.2, 0.1, 0.1, 0.1, 9.0]
    running, closeness, expected = losses[0], 0.01, []
    for loss in losses:
        running = 0.5 * running + 0.5 * loss
        if running < 1.0 and closeness < 1.0:
            closeness = closeness * 2.0 if closeness < 0.1 else min(1.0, closeness + 0.3)
        expected.append(closeness)
    # The loop waits, doubles, waits again, adds, and stops at 1.
    assert len(set(expected)) == 8
    assert expected[-1] == 1.0
    curriculum, found = CellCurriculum(settings, tiny_model()), []
    for step, loss in enumerate(losses):
        curriculum.advance(torch.tensor(loss, dtype=torch.float64), step)
        found.append(curriculum.closeness)
    assert found == pytest.approx(expected, rel=1e-12)


def test_mask_is_the_logarithm_between_different_cells():
    curriculum = CellCurriculum(CurriculumSettings(start=0.25), tiny_model())
    mask = curriculum.mask(torch.zeros(1, 1, 16, 16))
    assert mask.dtype == torch.float32
    for i, first in enumerate(CELLS):
        for j, second in enumerate(CELLS):
            assert mask[i, j].item() == pytest.approx(0.0 if first == second else math.log(0.25))
    with torch.autocast("cpu", torch.bfloat16):
        assert curriculum.mask(torch.zeros(1, 1, 16, 16)).dtype == torch.bfloat16
    curriculum.closeness = 1.0
    assert curriculum.mask(torch.zeros(1, 1, 16, 16)) is None


@torch.no_grad()
def test_nearly_apart_every_cell_is_an_image_of_its_own():
    model = tiny_model().eval()
    curriculum = CellCurriculum(CurriculumSettings(start=1e-30), model)
    first = torch.randn(1, 1, 16, 16)
    second = first.clone()
    second[..., 8:, 8:] += 1.0
    before, after = (model(images, attn_mask=curriculum.mask(images)) for images in (first, second))
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=1e-6)
    assert (before[:, 3] - after[:, 3]).abs().max() > 1e-3
    assert (model(first)[:, :3] - model(second)[:, :3]).abs().max() > 1e-4


def test_mark_gives_the_tokens_of_a_cell_one_vector():
    model, again, other = tiny_model(), tiny_model(), tiny_model()
    before = model.pos_embed.detach().clone()
    for one, seed in ((model, 7), (again, 7), (other, 8)):
        CellCurriculum(CurriculumSettings(code=0.5), one).mark(one, seed)
    assert torch.equal(model.pos_embed, again.pos_embed)
    assert not torch.equal(model.pos_embed, other.pos_embed)
    added = (model.pos_embed - before)[0].detach()
    for i, first in enumerate(CELLS):
        for j, second in enumerate(CELLS):
            assert torch.allclose(added[i], added[j], atol=1e-6) == (first == second)
    assert 0.3 < added[:4].std() < 0.7


@pytest.mark.parametrize(
    ("reg_tokens", "img_size"),
    [pytest.param(2, 16, id="a prefix token too few"), pytest.param(3, 12, id="cells that do not divide the grid")],
)
def test_a_model_without_room_for_the_cells_is_refused(reg_tokens, img_size):
    with pytest.raises(ConfigError, match="needs a prefix token for each"):
        CellCurriculum(CurriculumSettings(), tiny_model(reg_tokens, img_size))


@pytest.mark.parametrize(
    "values",
    [
        {"cells": 0},
        {"threshold": 0.0},
        {"start": 0.0},
        {"start": 1.5},
        {"factor": 1.0},
        {"increment": 0.0},
        {"smoothing": 1.0},
        {"code": -0.1},
    ],
)
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(ConfigError, match="out of range"):
        CurriculumSettings(**values)


def test_state_survives_json_and_goes_on_alike():
    settings = CurriculumSettings(threshold=2.0, start=0.1, factor=1.5)
    original, restored = (CellCurriculum(settings, tiny_model()) for _ in range(2))
    for step in range(3):
        original.advance(torch.tensor(1.0 + step / 4), step)
    restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
    assert restored.state_dict() == original.state_dict()
    for curriculum in (original, restored):
        # A step that was counted already counts once, also after a restart.
        curriculum.advance(torch.tensor(9.0), 2)
        curriculum.advance(torch.tensor(1.0), 3)
    assert restored.state_dict() == original.state_dict()
    assert original.running_loss == pytest.approx(0.9 * (0.9 * (0.9 * 1.0 + 0.1 * 1.25) + 0.1 * 1.5) + 0.1 * 1.0)


def run(directory, *, stop_at=None, **changed):
    """Train with a curriculum that grows at every step; stopped in the middle as by an interruption."""
    model = tiny_model()
    curriculum = CellCurriculum(CurriculumSettings(threshold=100.0, factor=1.2), model)
    curriculum.mark(model, 0)
    objective = VisionObjective(Penalties({}), curriculum=curriculum)

    class Interrupted:
        state_dict, load_state_dict = objective.state_dict, objective.load_state_dict

        def __call__(self, model, batch, step):
            if step == stop_at:
                raise KeyboardInterrupt
            return objective(model, batch, step)

    settings = {"steps": 6, "batch_size": 4, "learning_rate": 0.01, "log_every": 1, "checkpoint_every": 2, **changed}
    train(model, Interrupted(), Scenes(), TrainingSettings(**settings), directory, device="cpu")
    return model, curriculum


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_one_step_counts_once_however_many_parts_it_has(tmp_path, parts):
    _, curriculum = run(tmp_path, gradient_accumulation=parts)
    assert curriculum.closeness == pytest.approx(0.001 * 1.2**6)


def test_a_resumed_run_ends_with_the_same_weights_and_closeness(tmp_path):
    whole, expected = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stop_at=5)
    resumed, found = run(tmp_path / "killed")
    assert found.state_dict() == expected.state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
