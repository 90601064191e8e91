"""Text corpora of the language experiments, as lists of documents with fixed splits.

Two come with packages of the Python index and need no other network: articles of the English Wikipedia and short news
(:mod:`entreg.data.assets`). Two are the paper's: WikiText-2 (perplexity) and CNN/DailyMail (summaries), read from a
folder or from the Hugging Face hub. The packaged ones have no official splits; ours depend on the place of a document
in its file and on nothing else: of every five documents three train, one validates and one tests.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from entreg.data.assets import asset_path, cache_directory
from entreg.data.hub import hub_folder, is_hub_name
from entreg.data.mediawiki import plain_text, read_articles
from entreg.errors import AssetError, ConfigError, InputError
from entreg.names import listed_files, require_known

SPLITS = ("train", "validation", "test")

_MIN_WORDS = 250  # Articles with fewer words outside lists are stubs; our choice.
_SPLIT_OF_FIVE = ("train", "train", "train", "validation", "test")


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order.

    Attributes:
        name: as given to :func:`corpus`.
        revision: SHA-256 of all documents, for run records: of the text as it is used, so that it also tells apart
            versions of the software that reads it.
        documents: plain text.
        splits: of each document, one of :data:`SPLITS`.
        references: of each document, a summary written by people; None where the corpus has none.
        continuous: the documents are consecutive pieces of one text, to be read as one (WikiText-2: perplexity is
            measured in the literature on the whole split, joined); otherwise they have nothing to do with each other.
    """

    name: str
    revision: str
    documents: tuple[str, ...]
    splits: tuple[str, ...]
    references: tuple[str, ...] | None = None
    continuous: bool = False

    def part(self, split: str) -> Corpus:
        """The documents of one split.

        Raises:
            InputError: unknown split.
            AssetError: the corpus has no documents in it.
        """
        _require_split(split)
        chosen = [place for place, own in enumerate(self.splits) if own == split]
        if not chosen:
            raise AssetError(f"{self.name} holds no documents of the split {split}")
        references = None if self.references is None else tuple(self.references[place] for place in chosen)
        return replace(
            self,
            documents=tuple(self.documents[place] for place in chosen),
            splits=(split,) * len(chosen),
            references=references,
        )


def corpus(name: str, root: str | Path | None = None, split: str | None = None) -> Corpus:
    """A text corpus.

    Args:
        name: ``wikipedia_sample`` (articles of Wikipedia without redirects, lists of names and stubs), ``news_sample``,
            ``wikitext_2`` (raw, not the version with ``<unk>``) or ``cnn_dailymail`` (version 3.0.0).
        root: of ``wikitext_2`` and ``cnn_dailymail``: a folder with the hub's parquet files
            (``validation-*.parquet``, also in subfolders), or written by ``save_to_disk``, or a data set's name on the
            hub; None stands for the official name there. Of the packaged ones None.
        split: one of :data:`SPLITS`; None: all that there are.

    Raises:
        ConfigError: unknown name, a root for a packaged corpus, or a missing package.
        InputError: unknown split.
        AssetError: the data are missing, damaged, without the split or its columns, or the hub cannot be reached.
    """
    if split is not None:
        _require_split(split)
    require_corpus(name)
    if name in _PACKAGED:
        if root is not None:
            raise ConfigError(f"a root is set to {root}, but {name} comes as a package and has none")
        whole = _PACKAGED[name]()
        return whole if split is None else whole.part(split)
    return _TABLES[name](root, SPLITS if split is None else (split,))


def require_corpus(name: str) -> None:
    """Make sure that there is a corpus of this name; none of its files is looked at.

    Raises:
        ConfigError: there is not.
    """
    require_known([name], [*_PACKAGED, *_TABLES], "text corpus")


@lru_cache(maxsize=1)
def _wikipedia_sample() -> Corpus:
    documents, splits = [], []
    for place, article in enumerate(read_articles(asset_path("wikipedia_sample"))):
        text = "" if article.is_disambiguation else plain_text(article.markup)
        prose = [line for line in text.split("\n") if not line.startswith("- ")]
        if sum(len(line.split()) for line in prose) >= _MIN_WORDS:
            documents.append(text)
            # By the place in the file: the software that reads the markup must not move documents between splits.
            splits.append(_SPLIT_OF_FIVE[place % 5])
    return _corpus("wikipedia_sample", documents, splits)


@lru_cache(maxsize=1)
def _news_sample() -> Corpus:
    lines = asset_path("news_sample").read_text(encoding="utf-8").splitlines()
    documents = [line.strip() for line in lines if line.strip()]
    return _corpus("news_sample", documents, [_SPLIT_OF_FIVE[place % 5] for place in range(len(documents))])


def _wikitext_2(root: str | Path | None, splits: Sequence[str]) -> Corpus:
    documents, of_split = [], []
    for split in splits:
        keys = "WIKITEXT= of make or data.text.root="
        source = _Source("wikitext_2", "Salesforce/wikitext", "wikitext-2-raw-v1", root, keys)
        rows = _columns(source, split, ["text"])["text"]
        if sum(row.count("<unk>") for row in rows[:2000]) > 20:
            raise AssetError(
                "this WikiText-2 has its rare words replaced by <unk>; take wikitext-2-raw-v1, the raw version"
            )
        # Joined as in the literature's evaluations (a blank line between rows), then cut before each article's title.
        pieces = [*(f"{row}\n\n" for row in rows[:-1]), rows[-1]]
        starts = [place for place, row in enumerate(rows) if _WIKITEXT_TITLE.fullmatch(row)]
        bounds = [0, *(place for place in starts if place), len(rows)]
        articles = ["".join(pieces[start:end]) for start, end in itertools.pairwise(bounds)]
        # The blank rows before the first title belong to the first article.
        if len(articles) > 1 and not articles[0].strip():
            articles = [articles[0] + articles[1], *articles[2:]]
        documents += articles
        of_split += [split] * len(articles)
    return replace(_corpus("wikitext_2", documents, of_split), continuous=True)


def _cnn_dailymail(root: str | Path | None, splits: Sequence[str]) -> Corpus:
    documents, references, of_split = [], [], []
    for split in splits:
        source = _Source("cnn_dailymail", "abisee/cnn_dailymail", "3.0.0", root, "CNN= of make or data.summaries.root=")
        table = _columns(source, split, ["article", "highlights"])
        documents += table["article"]
        references += table["highlights"]
        of_split += [split] * len(table["article"])
    return replace(_corpus("cnn_dailymail", documents, of_split, references), references=tuple(references))


_PACKAGED = {"wikipedia_sample": _wikipedia_sample, "news_sample": _news_sample}
_TABLES = {"wikitext_2": _wikitext_2, "cnn_dailymail": _cnn_dailymail}
# " = Title = ", not " = = Section = = ".
_WIKITEXT_TITLE = re.compile(r" = [^=\s](?:.*[^=\s])? = \n?")


@dataclass(frozen=True)
class _Source:
    """Where a data set of the hub is taken from: its own name there and its configuration, or the user's root.

    ``keys`` says how to name the root.
    """

    name: str
    hub: str
    configuration: str
    root: str | Path | None
    keys: str

    @property
    def advice(self) -> str:
        command = f"hf download {self.hub} --repo-type dataset --include '{self.configuration}/*'"
        return f"fetch it with `{command} --local-dir FOLDER` and name that folder as {self.keys}"


def _folder(source: _Source, split: str) -> Path:
    """The folder with a split: the user's own, or the hub's cache."""
    if source.root and Path(source.root).expanduser().is_dir():
        return Path(source.root).expanduser()
    name = str(source.root) if source.root else source.hub
    if not is_hub_name(name):
        raise AssetError(f"there is no folder {name} with {source.name}; {source.advice}")
    return hub_folder(name, [f"{source.configuration}/{split}-*.parquet"], keys=source.keys, data_set=True)


def _columns(source: _Source, split: str, columns: Sequence[str]) -> dict[str, list[str]]:
    """The columns of one split, as lists of text."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"reading {source.name} needs the package datasets: pip install datasets") from error
    where, table = _folder_table(datasets, _folder(source, split), source, split)
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise AssetError(f"{where} has the columns {', '.join(table.column_names)} where {missing[0]} is needed")
    values = {column: table[column][:] for column in columns}
    for column, texts in values.items():
        if not texts or not all(isinstance(text, str) for text in texts):
            raise AssetError(f"{where} holds {'rows that are no text' if texts else 'no rows'} in its column {column}")
    return values


def _folder_table(datasets: Any, folder: Path, source: _Source, split: str) -> tuple[str, Any]:
    try:
        if (folder / "dataset_dict.json").is_file():
            if not (folder / split).is_dir():
                raise AssetError(f"{folder} holds no split {split}; save it with all splits, or {source.advice}")
            return f"{folder}/{split}", datasets.load_from_disk(str(folder / split))
        if (folder / "state.json").is_file():
            own = datasets.load_from_disk(str(folder))
            if own.split is not None and str(own.split) != split:
                raise AssetError(f"{folder} holds the split {own.split}, where {split} is wanted")
            return str(folder), own
        inner = folder / source.configuration
        files = _split_files(inner if inner.is_dir() else folder, split)
        if not files:
            raise AssetError(f"{folder} holds no {split}-*.parquet ({listed_files(folder)}); {source.advice}")
        table = datasets.load_dataset(
            "parquet",
            data_files={"rows": [str(path) for path in files]},
            split="rows",
            cache_dir=str(cache_directory() / "parquet"),
        )
        return f"{files[0].parent}/{split}-*.parquet", table
    except (KeyError, ValueError, TypeError, OSError, datasets.exceptions.DatasetsError) as error:
        raise AssetError(f"{folder} cannot be read as {source.name}, it is damaged; {source.advice}") from error


def _split_files(folder: Path, split: str) -> list[Path]:
    for pattern in (f"{split}-*.parquet", f"{split}.parquet", f"data/{split}-*.parquet"):
        files = sorted(folder.glob(pattern))
        if files:
            promised = re.search(r"-of-(\d+)$", files[0].stem)
            if promised and int(promised[1]) != len(files):
                raise AssetError(f"{folder} holds {len(files)} files like {files[0].name}; some are missing")
            return files
    return []


def _corpus(name: str, documents: Sequence[str], splits: Sequence[str], references: Sequence[str] = ()) -> Corpus:
    digest = hashlib.sha256()
    for text in [*documents, *references]:
        digest.update(hashlib.sha256(text.encode()).digest())
    return Corpus(name, digest.hexdigest(), tuple(documents), tuple(splits))


def _require_split(split: str) -> None:
    require_known([split], SPLITS, "split", error=InputError)
