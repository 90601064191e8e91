"""What the hooks make of the pages under docs/ for the site; `make docs` builds it all and fails on dead links."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs", reason="the site is built with mkdocs of the extra dev")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Everything:
    """A site that holds whatever file it is asked for."""

    def get_file_from_path(self, place):
        return place


def relinked(hooks, markdown, page="results/vision.md", files=None):
    shown = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    return hooks.on_page_markdown(markdown, shown, None, files or Everything())


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[a](../../results/tables/claims.md#vit-l1)", "[a](../tables/claims.md#vit-l1)"),
        ("![a](../../results/figures/claims.png)", "![a](../figures/claims.png)"),
        ("[a](../method.md)", "[a](../method.md)"),
        # No part of the site, and nobody knows where the repository will lie: the words stay.
        ("[`code`](../../entreg/sparse/tokens/soft_partition.py)", "`code`"),
        ("[a](https://arxiv.org/abs/2509.03733)", "[a](https://arxiv.org/abs/2509.03733)"),
        ("[a](#what-was-run)", "[a](#what-was-run)"),
        ("```\n[a](nowhere.md)\n```", "```\n[a](nowhere.md)\n```"),
    ],
)
def test_links_are_those_of_the_site(hooks, written, shown):
    assert relinked(hooks, written) == shown


def test_a_dead_link_ends_the_build(hooks):
    with pytest.raises(FileNotFoundError, match=r"docs/use\.md links to docs/nowhere\.md"):
        relinked(hooks, "[a](nowhere.md)", page="use.md")


def test_formulas_need_no_script(hooks):
    page = r'<p><span class="arithmatex">\(n_j \ge 0\)</span></p><div class="arithmatex">\[a &lt; b\]</div>'
    content = hooks.on_page_content(page, None, None, None)
    assert "arithmatex" not in content
    assert content.count("<math") == 2
    assert 'display="block"' in content
