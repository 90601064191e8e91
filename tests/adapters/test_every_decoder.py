"""Every decoder class of the installed transformers: the stock model at sparsity 0, or refused by name."""

from itertools import chain

import pytest
import torch

from entreg.adapters import probe, sparsify
from entreg.errors import InputError
from entreg.sparse import DecoderSparsity
from tests.adapters.every_decoder import CLASSES, KNOWN, build
from tests.adapters.small_decoders import VOCABULARY, padding, tokens, transformers

SPARSE = DecoderSparsity(sparsity=0.4, selection="pooled", block_size=4, pool_size=4, dense_tail_blocks=0, page_size=4)
LENGTH = 40
RUN = [*KNOWN["served"], *chain(*KNOWN["dense_only"].values())]
REFUSED = {name: reason for reason, names in KNOWN["refused"].items() for name in names}
# One of each kind that has been wrong once: keys that models select (by token, by block), keys that layers share,
# latent keys, windows, an additive bias, and a base model that is passed by.
SAMPLE = [
    *("axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "minimax_m3_vl_text", "inkling_text"),
    *("gemma3n_text", "gemma4_text", "gpt2", "opt"),
]
# Their indexers, where these exist; with a limit that large they select everything.
LIMITS = ("index_topk", "index_topk_blocks")


def in_chunks(model, x, sizes=(20, 13, 5, 1, 1), mask=None):
    cache = transformers.DynamicCache(config=model.config)
    parts, start = [], 0
    for size in sizes:
        start += size
        seen = None if mask is None else mask[:, :start]
        part = model(x[:, start - size : start], attention_mask=seen, past_key_values=cache, use_cache=True)
        parts.append(part.logits)
    return torch.cat(parts, 1)


def written(model, x, **options):
    mask = padding(side="left")
    return model.generate(x, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0, **options)


def packed(model, x, **options):
    return model(x, position_ids=torch.arange(LENGTH)[None] % 17, use_cache=False, **options).logits


def blocks():
    """The mask of two documents in one row, the second of which begins at 17."""
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[17:, :17] = False
    return mask.expand(2, 1, -1, -1)


CASES = {
    "no cache": lambda model, x: model(x, use_cache=False).logits,
    "left padding": lambda model, x: model(x, attention_mask=padding(side="left"), use_cache=False).logits,
    "right padding": lambda model, x: model(x, attention_mask=padding(side="right"), use_cache=False).logits,
    "packed by positions": packed,
    "packed by a mask": lambda model, x: packed(model, x, attention_mask=blocks()),
    "chunks": in_chunks,
    "padded chunks": lambda model, x: in_chunks(model, x, mask=padding(side="left")),
    "written": written,
    "written, static cache": lambda model, x: written(model, x, cache_implementation="static"),
}


def outcome(case, model, x):
    """What a case gives, or the error that it ends in."""
    try:
        return CASES[case](model, x)
    except (RuntimeError, TypeError, ValueError) as error:
        return error


def require_same(model, x, wanted):
    for case, stock in wanted.items():
        ours = outcome(case, model, x)
        if isinstance(stock, Exception):
            # Two decoders of larger models cannot write by themselves.
            assert case.startswith("written")
            assert type(ours) is type(stock)
        else:
            assert torch.is_tensor(ours), f"{case}: {ours}"
            assert torch.equal(ours, stock), case


@torch.no_grad()
def check_dense(name):
    model, x = build(name), tokens(length=LENGTH)
    wanted = {case: outcome(case, model, x) for case in CASES}
    assert torch.isfinite(wanted["no cache"]).all()
    limits = [limit for limit in LIMITS if hasattr(model.config, limit)]
    for limit in limits:
        # The test is of no use where the model's own selection does not matter.
        assert not torch.equal(build(name, **{limit: 4096})(x, use_cache=False).logits, wanted["no cache"])
    with sparsify(model, 0.0):
        require_same(model, x, wanted)
        if name not in KNOWN["dense_only"].get("position_bias", ()):
            with probe(model) as watching:
                require_same(model, x, wanted)
            assert [capture.layer for capture in watching.captures] == list(range(len(watching.changed)))
    require_same(model, x, {"no cache": wanted["no cache"]})


@torch.no_grad()
def check_sparse(name):
    model, x = build(name), tokens(length=LENGTH)
    mask = padding(side="left")
    argument = next((argument for argument, names in KNOWN["dense_only"].items() if name in names), None)
    with sparsify(model, SPARSE, record=True) as handle:
        if argument is not None:
            with pytest.raises(InputError, match=f"'{argument}'"):
                model(x, use_cache=False)
            return
        out = model(x, attention_mask=mask, use_cache=False).logits
        assert out.shape == (2, LENGTH, VOCABULARY)
        assert torch.isfinite(out[mask.bool()]).all()
        assert [selection.layer for selection in handle.selections] == list(range(len(handle.changed)))
        assert any(selection.plan is not None for selection in handle.selections)
        wrote = outcome("written", model, x)
    stock = outcome("written", model, x)
    assert not torch.equal(out, model(x, attention_mask=mask, use_cache=False).logits)
    assert type(wrote) is type(stock)
    if torch.is_tensor(stock):
        assert wrote.shape == stock.shape


@torch.no_grad()
def check_padding(name):
    model, x = build(name), tokens(length=LENGTH)
    if model._can_set_experts_implementation():
        # The others have no float64.
        model.set_experts_implementation("eager")
    model.double()
    for side in ("left", "right"):
        mask = padding(side=side)
        real = mask.bool()
        other = torch.where(real, x, (x + 7) % (VOCABULARY - 2) + 2)
        assert not torch.equal(other, x)
        with sparsify(model, SPARSE):
            wanted, ours = (model(given, attention_mask=mask, use_cache=False).logits[real] for given in (x, other))
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


def test_every_class_is_known():
    listed = [*RUN, *REFUSED, *chain(*KNOWN["unbuilt"].values())]
    assert len(set(listed)) == len(listed)
    untested, gone = sorted(set(CLASSES) - set(listed)), sorted(set(listed) - set(CLASSES))
    assert not untested, f"untested decoders of transformers {transformers.__version__}: {', '.join(untested)}"
    assert not gone, f"not in transformers {transformers.__version__}: {', '.join(gone)}"


@pytest.mark.parametrize("name", SAMPLE)
def test_sampled_classes_are_stock_at_sparsity_zero(name):
    check_dense(name)


@pytest.mark.parametrize("name", SAMPLE)
def test_sampled_classes_run_sparsely(name):
    check_sparse(name)


@pytest.mark.parametrize("name", [name for name in SAMPLE if name in KNOWN["served"]])
def test_content_of_padding_changes_nothing_in_sampled_classes(name):
    check_padding(name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", RUN)
def test_every_class_is_stock_at_sparsity_zero(name):
    check_dense(name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", RUN)
def test_every_class_runs_sparsely(name):
    check_sparse(name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", KNOWN["served"])
def test_content_of_padding_changes_nothing_in_every_class(name):
    check_padding(name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", REFUSED)
def test_every_other_class_is_refused_before_anything_changes(name):
    # Composite models are large, and nothing is computed.
    model = build(name, device="meta")
    for change in (lambda: sparsify(model, 0.5), lambda: probe(model)):
        with pytest.raises(InputError) as caught:
            change()
        assert REFUSED[name] in str(caught.value)
    assert not any("entreg" in attribute for module in model.modules() for attribute in vars(module))
