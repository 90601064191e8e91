"""Token sequences on which language models are measured: windows of text, copies, needles and summaries.

Everything follows from the corpus, the tokenizer and the seed, and item ``i`` does not depend on how many are asked
for. Perplexity on windows alone hardly tells sparse attention from dense, because most tokens are predicted from their
neighbours; copying and finding a needle need keys far away.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entreg.data.text import Corpus
from entreg.errors import InputError


@dataclass(frozen=True)
class NeedleTask:
    """A number hidden in text, and the question for it.

    Attributes:
        input_ids: (n,) int64, the text with the needle and the question, up to the word before the number.
        answer_ids: (a,) int64, the number. Right is a greedy continuation whose first ``a`` tokens are these.
        depth: where in the text the needle stands, 0 at its start, 1 at its end.
    """

    input_ids: Tensor
    answer_ids: Tensor
    depth: float


@dataclass(frozen=True)
class SummaryTask:
    """An article to be summarised.

    Attributes:
        input_ids: (n,) int64, the article, cut where it is too long, and the instruction.
        reference: a summary by people: the article's own first paragraph, which the input lacks, or the corpus's.
    """

    input_ids: Tensor
    reference: str


def token_windows(
    corpus: Corpus, tokenizer: Any, length: int, *, count: int | None, split: str | None = None, seed: int = 0
) -> Tensor:
    """Disjoint windows of packed documents.

    Documents follow each other in the corpus's order, each with the special tokens that the tokenizer puts around a
    text and an end-of-text token after it; a window may hold the end of one and the start of the next. A continuous
    corpus (WikiText-2) is one text without such tokens inside, which is how the literature measures perplexity on it.

    Args:
        corpus: what the windows are cut from.
        tokenizer: of ``transformers``.
        length: tokens per window, at least 2.
        count: number of windows; None: as many as there are.
        split: of the corpus; None: all documents it has.
        seed: chooses the windows among those that there are, and their order.

    Returns:
        (count, length) int64.

    Raises:
        InputError: a value is out of range, or the corpus has too few tokens; it says how many windows fit.
        AssetError: the corpus has no such split.
    """
    if length < 2 or (count is not None and count < 1):
        raise InputError(f"token windows need length >= 2 and count >= 1, got {length} and {count}")
    part = corpus if split is None else corpus.part(split)
    tokens = _packed_tokens(part, tokenizer)
    fit = len(tokens) // length
    if fit < (count or 1):
        raise InputError(
            f"{part.name}{f' ({split})' if split else ''} has {len(tokens)} tokens: {fit} windows of {length} fit, "
            f"{count or 1} are wanted"
        )
    order = np.random.default_rng(seed).permutation(fit)[:count]
    windows = torch.tensor(tokens[: fit * length], dtype=torch.int64).view(fit, length)
    return windows[torch.from_numpy(order)]


def copy_windows(windows: Tensor, tokenizer: Any = None) -> Tensor:
    """Every window twice in a row: ``[bos] text text``. The loss is measured on the second copy.

    Args:
        windows: (count, half) int64.
        tokenizer: whose beginning-of-text token is put first; None, or without such a token: none is.

    Returns:
        (count, 2 * half), or (count, 1 + 2 * half) with that token.

    Raises:
        InputError: windows of another shape.
    """
    if windows.ndim != 2 or windows.shape[1] < 1:
        raise InputError(f"windows must have shape (count, half), got {tuple(windows.shape)}")
    first = _first_ids(tokenizer) if tokenizer is not None else []
    start = windows.new_tensor(first).expand(len(windows), len(first))
    return torch.cat([start, windows, windows], dim=1)


def needle_tasks(
    corpus: Corpus,
    tokenizer: Any,
    *,
    length: int,
    depths: Sequence[float],
    count: int,
    split: str | None = None,
    seed: int = 0,
) -> list[NeedleTask]:
    """Sentences with a secret number, hidden in text at given depths, with the question at the end.

    The text around the needle starts at a random place of the packed documents (see :func:`token_windows`); the needle
    stands on a line of its own, moved forward to the nearest end of a sentence. The prompt is plain text that a model
    continues, with or without instruction tuning.

    Args:
        corpus: the text around the needle.
        tokenizer: of ``transformers``.
        length: tokens of prompt and answer together, at least 128.
        depths: each in [0, 1].
        count: tasks at each depth; task ``i`` has the same text, city and number at all depths.
        split: of the corpus; None: all documents it has.
        seed: decides texts, cities and numbers.

    Returns:
        ``count`` tasks of the first depth, then of the next, and so on.

    Raises:
        InputError: a value is out of range, or the corpus has too few tokens.
        AssetError: the corpus has no such split.
    """
    if length < 128 or count < 1 or not depths or not all(0.0 <= depth <= 1.0 for depth in depths):
        raise InputError(
            f"needle tasks need length >= 128, count >= 1 and depths in [0, 1], got {length}, {count} and "
            f"{list(depths)}"
        )
    part = corpus if split is None else corpus.part(split)
    tokens = _packed_tokens(part, tokenizer)
    if len(tokens) < length:
        raise InputError(f"{part.name} has {len(tokens)} tokens, fewer than one needle task of {length} needs")
    return [
        _needle_task(tokens, tokenizer, length, depth, np.random.default_rng((seed, index)))
        for depth in depths
        for index in range(count)
    ]


def summary_tasks(
    corpus: Corpus,
    tokenizer: Any,
    *,
    count: int,
    max_tokens: int,
    min_tokens: int = 128,
    split: str | None = None,
    seed: int = 0,
) -> list[SummaryTask]:
    """Articles to be summarised, with a summary by people.

    Where the corpus has summaries (CNN/DailyMail: the highlights), they are the reference. Otherwise it is the
    article's lead: its first paragraph, or of an article in one paragraph its first sentence; it is removed from the
    input. The instruction follows the article, within the tokenizer's chat template where it has one.

    Args:
        corpus: the articles.
        tokenizer: of ``transformers``.
        count: number of tasks.
        max_tokens: of the input; longer articles are cut at the end. At least ``min_tokens`` and the instruction.
        min_tokens: articles with fewer tokens besides the lead are passed over, at least 1.
        split: of the corpus; None: all documents it has.
        seed: chooses the articles, and their order.

    Raises:
        InputError: a value is out of range, or the corpus has too few such articles; it says how many there are.
        AssetError: the corpus has no such split.
    """
    if count < 1 or min_tokens < 1:
        raise InputError(f"summary tasks need count >= 1 and min_tokens >= 1, got {count} and {min_tokens}")
    part = corpus if split is None else corpus.part(split)
    before, after = _summary_frame(tokenizer)
    room = max_tokens - len(before) - len(after)
    if room < min_tokens:
        raise InputError(
            f"max_tokens of summary tasks must be at least {max_tokens - room + min_tokens} (instruction and "
            f"min_tokens), got {max_tokens}"
        )
    tasks: list[SummaryTask] = []
    for place in np.random.default_rng(seed).permutation(len(part.documents)):
        document = part.documents[place]
        reference, article = (part.references[place], document) if part.references else _lead_and_rest(document)
        if len(reference.split()) < _MIN_REFERENCE_WORDS:
            continue
        # Tokens are shorter than this many characters on average in every language and tokenizer in use.
        tokens = _ids(tokenizer, article[: 20 * room])[:room]
        if len(tokens) >= min_tokens:
            tasks.append(SummaryTask(torch.tensor(before + tokens + after), reference))
        if len(tasks) == count:
            return tasks
    raise InputError(
        f"{part.name}{f' ({split})' if split else ''} has {len(tasks)} articles of {min_tokens} tokens with a summary, "
        f"{count} are wanted"
    )


_MIN_REFERENCE_WORDS = 12
_SUMMARY_INSTRUCTION = "\n\nSummarize the article above in one short paragraph."
_CITIES = (
    *("Amsterdam", "Ankara", "Athens", "Baghdad", "Bangkok", "Barcelona", "Berlin", "Boston", "Brussels", "Budapest"),
    *("Cairo", "Chicago", "Copenhagen", "Dallas", "Dublin", "Edinburgh", "Florence", "Geneva", "Glasgow", "Hamburg"),
    *("Helsinki", "Houston", "Istanbul", "Jakarta", "Lima", "Lisbon", "London", "Madrid", "Manila", "Melbourne"),
    *("Miami", "Milan", "Montreal", "Moscow", "Mumbai", "Munich", "Nairobi", "Naples", "Oslo", "Ottawa", "Paris"),
    *("Prague", "Rome", "Seattle", "Seoul", "Stockholm", "Sydney", "Tokyo", "Toronto", "Vienna", "Warsaw", "Zurich"),
)


def _needle_task(tokens: list[int], tokenizer: Any, length: int, depth: float, rng: np.random.Generator) -> NeedleTask:
    city, number = _CITIES[rng.integers(len(_CITIES))], int(rng.integers(10_000, 100_000))
    needle = _ids(tokenizer, f"\nThe secret number of {city} is {number}.\n")
    prompt = f"\n\nQuestion: What is the secret number of {city}?\nAnswer: The secret number of {city} is"
    # Tokenized together, and cut where the number starts: a tokenizer may merge across the border.
    question, whole = _ids(tokenizer, prompt), _ids(tokenizer, f"{prompt} {number}")
    border = next((place for place, pair in enumerate(zip(question, whole, strict=False)) if len(set(pair)) > 1), None)
    border = min(len(question), len(whole)) if border is None else border
    first = _first_ids(tokenizer)
    size = length - len(first) - len(needle) - len(whole)
    start = int(rng.integers(len(tokens) - size + 1))
    text = tokens[start : start + size]
    place = _sentence_end(text, round(depth * size), tokenizer)
    prompt_ids = [*first, *text[:place], *needle, *text[place:], *whole[:border]]
    return NeedleTask(torch.tensor(prompt_ids), torch.tensor(whole[border:]), float(depth))


def _sentence_end(tokens: list[int], place: int, tokenizer: Any) -> int:
    """The nearest place at or before ``place`` where a sentence or line ends; 0 where there is none."""
    if place == len(tokens):
        return place
    while place > 0 and not re.search(r"[.!?\n]\s*$", tokenizer.decode([tokens[place - 1]])):
        place -= 1
    return place


def _summary_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens before and after the article: those of the chat template where the tokenizer has one."""
    if tokenizer.chat_template is None:
        return _first_ids(tokenizer), _ids(tokenizer, f"{_SUMMARY_INSTRUCTION}\nSummary:")
    mark = "\ue000"
    message = {"role": "user", "content": f"{mark}{_SUMMARY_INSTRUCTION}"}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    before, _, after = text.partition(mark)
    return _ids(tokenizer, before), _ids(tokenizer, after)


def _lead_and_rest(document: str) -> tuple[str, str]:
    lead, _, rest = document.partition("\n\n")
    if not rest:
        # News in one paragraph: journalists put the news into the first sentence.
        lead, rest = [*re.split(r"(?<=[.!?]) +(?=[A-Z\"'])", document, maxsplit=1), ""][:2]
    return lead.strip(), rest.strip()


def _packed_tokens(part: Corpus, tokenizer: Any) -> list[int]:
    if part.continuous:
        return list(tokenizer("".join(part.documents), verbose=False).input_ids)
    end = tokenizer.eos_token_id
    tokens: list[int] = []
    for document in part.documents:
        tokens += tokenizer(document, verbose=False).input_ids
        if end is not None and tokens[-1:] != [end]:
            tokens.append(end)
    return tokens


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _first_ids(tokenizer: Any) -> list[int]:
    """The token that a text starts with, if the tokenizer has one."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
