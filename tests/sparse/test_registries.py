"""What is registered outside the package serves plans by its name, and names are kept apart."""

import pytest
import torch

from entreg.adapters import sparsify
from entreg.errors import ConfigError
from entreg.names import Registry
from entreg.sparse import ColumnSparsity, TokenSparsity, selection_scores
from entreg.sparse.registries import SCORES
from entreg.sparse.scores import Score
from tests.adapters.small_models import images, small_model


class ByPlace(Score):
    """Later tokens first, at a cost that is made up."""

    def scores(self, inputs):
        places = torch.arange(inputs.sizes.num_keys, dtype=torch.float32)
        return places.expand(len(inputs.features), 1, -1)

    def entries(self, sizes):
        return 3 * sizes.num_keys


@pytest.fixture
def by_place():
    SCORES.register("by_place", ByPlace())
    yield "by_place"
    SCORES.remove("by_place")


def test_a_score_from_outside_serves_tokens_and_its_cost_is_counted(by_place):
    model, x = small_model(), images()
    tokens, depth = 1 + model.patch_embed.num_patches, len(model.blocks)
    with sparsify(model, TokenSparsity(keep=5, before_layer=1, score=by_place), record=True) as handle:
        model(x)
        kept = handle.selections[0].kept
        assert kept[0].tolist() == [0, *range(tokens - 5, tokens)]
        computed = tokens**2 + 3 * tokens + (depth - 1) * 6**2
        assert handle.realised_sparsity(x) == pytest.approx(1 - computed / (depth * tokens**2))
    q, k = torch.randn(2, 2, 4, 7, 3)
    found = selection_scores(q, k, by_place, features=torch.randn(2, 7, 5))
    assert torch.equal(found, torch.arange(7.0).expand(2, 4, 7))


def test_unknown_names_are_refused_with_the_nearest(by_place):
    for wrong in (lambda: ColumnSparsity(keys=3, score="by_plaec"), lambda: TokenSparsity(keep=3, score="by_plaec")):
        with pytest.raises(ConfigError, match="did you mean 'by_place'"):
            wrong()


def test_names_are_words_and_taken_once():
    things = Registry("thing")
    assert things.register("one", 1) == 1
    with pytest.raises(ConfigError, match="there is a thing 'one' already"):
        things.register("one", 2)
    for wrong in ("two words", "", 3):
        with pytest.raises(ConfigError, match="the name of a thing must be a word"):
            things.register(wrong, 2)
    assert dict(things) == {"one": 1}
    assert ["one"] not in things
    things.remove("one")
    assert not things
