"""Corpora: the packaged ones against their own files, the paper's on small files in the official layout."""

import os
import re
import subprocess
import sys

import datasets
import pytest

from entreg.data.assets import asset_path
from entreg.data.mediawiki import read_articles
from entreg.data.text import SPLITS, corpus
from entreg.errors import AssetError, ConfigError, InputError


@pytest.fixture(autouse=True)
def quiet_datasets():
    datasets.disable_progress_bars()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Parquet files are unpacked below a cache; not the user's."""
    monkeypatch.setenv("ENTREG_CACHE", str(tmp_path / "cache"))


def test_wikipedia_holds_prose_of_its_articles_and_no_markup():
    whole = corpus("wikipedia_sample")
    markup = {re.sub(r"\W+", " ", article.title): article.markup for article in read_articles(asset_path(whole.name))}
    assert 80 <= len(whole.documents) <= len(markup)
    assert whole.documents[0].startswith(
        "Anarchism is a political philosophy that advocates self-governed societies based on voluntary institutions."
    )
    # Links and emphasis may end inside a word.
    plain = [re.sub(r"\[\[|\]\]|'{2,}", "", text) for text in markup.values()]
    every_word = {word for text in plain for word in re.findall(r"[A-Za-z]{4,}", text)}
    for text in whole.documents:
        assert not re.search(r"\[\[|\]\]|\{\{|\}\}|\{\||\|\}|<ref|</|'''|==|__[A-Z]+__|[\ue000-\uf8ff]|\(\)", text)
        assert len(text.split()) >= 250
    # Words with HTML inside are the exception.
    assert len({word for text in whole.documents for word in re.findall(r"[A-Za-z]{4,}", text)} - every_word) < 10


def test_wikipedia_splits_follow_the_place_in_the_file():
    whole = corpus("wikipedia_sample")
    assert [len(whole.part(split).documents) > 15 for split in SPLITS] == [True] * 3
    parts = [set(corpus("wikipedia_sample", split=split).documents) for split in SPLITS]
    assert len(set.union(*parts)) == sum(map(len, parts)) == len(whole.documents)
    articles = list(read_articles(asset_path(whole.name)))
    # A title that only one article starts with, by its place in the file: 0..2 of five train, 3 validates, 4 tests.
    for place, title, split in ((0, "Anarchism", 0), (3, "A", 1), (4, "Alabama", 2), (6, "Abraham Lincoln", 0)):
        assert articles[place].title == title
        assert any(text.startswith(f"{title} ") for text in parts[split])


def test_news_are_the_lines_of_their_file():
    whole = corpus("news_sample")
    lines = asset_path("news_sample").read_text(encoding="utf-8").split("\n")
    assert list(whole.documents) == [line.strip() for line in lines if line.strip()]
    assert whole.splits == ("train", "train", "train", "validation", "test") * 60
    assert whole.references is None
    assert not whole.continuous


def test_revision_tells_texts_apart_and_is_of_the_whole_corpus():
    news = corpus("news_sample")
    assert re.fullmatch("[0-9a-f]{64}", news.revision)
    assert news.revision == news.part("test").revision != corpus("wikipedia_sample").revision


WIKITEXT_ROWS = [
    *("", " = First Article = \n", "", " It begins , he said . \n", " = = Section = = \n", "", " More of x = y . \n"),
    *("", " = Second = \n", "", " Another one . \n", ""),
]


def write_parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(str(path))


def test_wikitext_is_the_joined_text_cut_before_titles(tmp_path, cache):
    for split in SPLITS:
        write_parquet(tmp_path / "root/wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet", text=WIKITEXT_ROWS)
    # Another configuration beside it, as on the hub, is left alone.
    write_parquet(tmp_path / "root/wikitext-103-raw-v1/test-00000-of-00001.parquet", text=[" = Wrong = \n"])
    found = corpus("wikitext_2", tmp_path / "root", "test")
    assert "".join(found.documents) == "\n\n".join(WIKITEXT_ROWS)
    assert [text.strip().splitlines()[0].strip() for text in found.documents] == ["= First Article =", "= Second ="]
    assert found.continuous
    assert corpus("wikitext_2", tmp_path / "root").splits == ("train",) * 2 + ("validation",) * 2 + ("test",) * 2


def test_wikitext_without_rare_words_is_refused(tmp_path, cache):
    write_parquet(tmp_path / "root/test.parquet", text=[" the <unk> of <unk> \n"] * 20)
    with pytest.raises(AssetError, match="take wikitext-2-raw-v1, the raw version"):
        corpus("wikitext_2", tmp_path / "root", "test")


def write_news(root, *, shards=2):
    for shard in range(shards):
        rows = [f"{shard}{row}" for row in range(2)]
        write_parquet(
            root / f"3.0.0/test-{shard:05d}-of-00002.parquet",
            article=[f"Article {row}" for row in rows],
            highlights=[f"Point {row} .\nOther ." for row in rows],
            id=rows,
        )


def test_cnn_dailymail_keeps_articles_with_their_highlights(tmp_path, cache):
    write_news(tmp_path / "root")
    found = corpus("cnn_dailymail", str(tmp_path / "root"), split="test")
    assert found.documents == ("Article 00", "Article 01", "Article 10", "Article 11")
    assert found.references == tuple(f"Point {row} .\nOther ." for row in ("00", "01", "10", "11"))
    assert found.part("test") == found


def test_saved_data_sets_are_read_with_and_without_their_dictionary(tmp_path, cache):
    rows = datasets.Dataset.from_dict({"article": ["A"], "highlights": ["H"], "id": ["1"]})
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "all"))
    rows.save_to_disk(str(tmp_path / "one"))
    for folder in ("all", "one"):
        assert corpus("cnn_dailymail", tmp_path / folder, "test").documents == ("A",)
    with pytest.raises(AssetError, match="holds no split validation"):
        corpus("cnn_dailymail", tmp_path / "all", "validation")


def test_every_wrong_folder_is_one_sentence(tmp_path, cache):
    def refused(match, split="test", name="cnn_dailymail"):
        with pytest.raises(AssetError, match=match) as caught:
            corpus(name, root, split)
        assert "\n" not in str(caught.value)

    root = tmp_path / "missing"
    refused("there is no folder .*missing with cnn_dailymail; fetch it with `hf download abisee/cnn_dailymail .*3.0.0")
    root.mkdir()
    refused(r"holds no test-\*\.parquet \(it is empty\)")
    write_news(root, shards=1)
    refused("holds 1 files like test-00000-of-00002.parquet; some are missing")
    write_news(root)
    refused(r"holds no validation-\*\.parquet \(it holds 3\.0\.0\)", split="validation")
    root = tmp_path / "columns"
    write_parquet(root / "test.parquet", article=["A"], id=["1"])
    refused("has the columns article, id where highlights is needed")
    refused("has the columns article, id where text is needed", name="wikitext_2")
    root = tmp_path / "rows"
    write_parquet(root / "test.parquet", article=["A", None], highlights=["H", "H"])
    refused("holds rows that are no text in its column article")
    root = tmp_path / "truncated"
    write_parquet(root / "test.parquet", article=["A"] * 500, highlights=["H"] * 500)
    whole = (root / "test.parquet").read_bytes()
    (root / "test.parquet").write_bytes(whole[: len(whole) // 2])
    refused("cannot be read as cnn_dailymail, it is damaged")


def test_hub_that_cannot_be_reached_is_one_sentence(tmp_path):
    script = (
        "from entreg.data.text import corpus\nfrom entreg.errors import AssetError\n"
        "for name, root in (('wikitext_2', None), ('cnn_dailymail', 'someone/news')):\n"
        "    try:\n        corpus(name, root, 'test')\n    except AssetError as error:\n        print(error)\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert all("the hub cannot be reached and has left no copy in its cache" in line for line in lines)
    assert "hf download Salesforce/wikitext --repo-type dataset --include 'wikitext-2-raw-v1/test-*" in lines[0]
    assert lines[1].startswith("someone/news is no folder here")


def test_wrong_arguments_name_what_is_right(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown text corpus 'enwik8', known are wikipedia_sample.*cnn_dailymail"):
        corpus("enwik8")
    with pytest.raises(ConfigError, match="news_sample comes as a package and has none"):
        corpus("news_sample", tmp_path)
    with pytest.raises(InputError, match="unknown split 'dev', known are train, validation, test"):
        corpus("news_sample", split="dev")
