"""Windows, copies, needles and summaries, with a tokenizer of bytes: what they must hold is said by the text itself."""

import re

import pytest
import torch

from entreg.data.language_tasks import copy_windows, needle_tasks, summary_tasks, token_windows
from entreg.data.text import Corpus
from entreg.errors import AssetError, InputError
from tests.data.small_tokenizers import BYTE_OFFSET, byte_ids, byte_tokenizer

START, END = 0, 1
CHAT = "<|user|>{{ messages[0]['content'] | trim }}</s>{% if add_generation_prompt %}A:{% endif %}"


def text_of(ids):
    return bytes(int(token) - BYTE_OFFSET for token in ids if token >= BYTE_OFFSET).decode()


def make_corpus(documents, splits=None, **fields):
    return Corpus("texts", "0", tuple(documents), tuple(splits or ["test"] * len(documents)), **fields)


SENTENCES = make_corpus([" ".join(f"Sentence {row} of text {text}." for row in range(60)) for text in range(5)])


@pytest.mark.parametrize("starts_texts", [False, True])
def test_windows_are_disjoint_pieces_of_the_packed_documents(starts_texts):
    documents = ["first text", "second, longer text", "zürich"]
    tokenizer = byte_tokenizer(starts_texts=starts_texts)
    start = [START] if starts_texts else []
    packed = [token for text in documents for token in (*start, *byte_ids(text), END)]
    windows = token_windows(make_corpus(documents), tokenizer, 5, count=None, seed=3)
    assert windows.dtype == torch.int64
    assert windows.shape == (len(packed) // 5, 5)
    expected = [tuple(packed[place : place + 5]) for place in range(0, len(packed) - 4, 5)]
    assert sorted(map(tuple, windows.tolist())) == sorted(expected)


def test_windows_depend_on_the_seed_and_not_on_their_number():
    few, many, other = (
        token_windows(SENTENCES, byte_tokenizer(), 32, count=count, seed=seed)
        for count, seed in ((4, 7), (9, 7), (9, 8))
    )
    assert torch.equal(few, many[:4])
    assert not torch.equal(many, other)


def test_continuous_corpus_is_one_text_without_ends():
    pieces = ["A title\n\n", "and its text\n\n", "another"]
    windows = token_windows(make_corpus(pieces, continuous=True), byte_tokenizer(starts_texts=True), 4, count=None)
    assert sorted(windows.flatten().tolist()) == sorted([START, *byte_ids("".join(pieces))][: windows.numel()])
    assert END not in windows


def test_windows_of_a_split_hold_nothing_of_the_others():
    corpus = make_corpus(["aaaa" * 9, "bbbb" * 9, "cccc" * 9], ["train", "validation", "test"])
    windows = token_windows(corpus, byte_tokenizer(), 6, count=6, split="validation")
    assert set(text_of(windows.flatten())) == {"b"}
    with pytest.raises(AssetError, match="holds no documents of the split train"):
        token_windows(SENTENCES, byte_tokenizer(), 6, count=1, split="train")


def test_too_few_tokens_say_how_many_windows_fit():
    corpus = make_corpus(["x" * 99])
    assert token_windows(corpus, byte_tokenizer(), 20, count=5).shape == (5, 20)
    with pytest.raises(InputError, match=r"texts has 100 tokens: 5 windows of 20 fit, 6 are wanted"):
        token_windows(corpus, byte_tokenizer(), 20, count=6)
    with pytest.raises(InputError, match=r"texts \(test\) has 100 tokens: 0 windows of 101 fit, 1 are wanted"):
        token_windows(corpus, byte_tokenizer(), 101, count=None, split="test")
    with pytest.raises(InputError, match="length >= 2 and count >= 1, got 1 and 1"):
        token_windows(corpus, byte_tokenizer(), 1, count=1)


def test_copies_repeat_the_window_after_the_start_token():
    windows = torch.tensor([[5, 6, 7], [8, 9, 10]])
    assert copy_windows(windows).tolist() == [[5, 6, 7, 5, 6, 7], [8, 9, 10, 8, 9, 10]]
    assert copy_windows(windows, byte_tokenizer()).tolist() == [
        [START, 5, 6, 7, 5, 6, 7],
        [START, 8, 9, 10, 8, 9, 10],
    ]
    with pytest.raises(InputError, match=r"shape \(count, half\), got \(3,\)"):
        copy_windows(windows[0, :3])


def test_needles_stand_once_at_their_depth_between_sentences():
    depths = [0.0, 0.3, 0.5, 1.0]
    tasks = needle_tasks(SENTENCES, byte_tokenizer(), length=900, depths=depths, count=3, seed=1)
    assert [task.depth for task in tasks] == [depth for depth in depths for _ in range(3)]
    for task in tasks:
        assert len(task.input_ids) + len(task.answer_ids) == 900
        assert task.input_ids[0] == START
        prompt, answer = text_of(task.input_ids), text_of(task.answer_ids)
        needle = re.search(r"\nThe secret number of (\w+) is (\d{5})\.\n", prompt)
        assert answer == f" {needle[2]}"
        assert prompt.endswith(f"Question: What is the secret number of {needle[1]}?\nAnswer: The secret number of "
                               f"{needle[1]} is")  # fmt: skip
        assert prompt.count(needle[2]) == 1
        before, after = prompt[: needle.start()], prompt[needle.end() : prompt.index("\n\nQuestion")]
        if 0.0 < task.depth < 1.0:
            # Sentences have at most 23 bytes, and the place moves forward by less than one.
            assert before.endswith(".")
            assert 0 <= task.depth * len(before + after) - len(before) <= 24
        else:
            assert (after if task.depth else before) == ""


def test_needles_of_one_index_differ_in_depth_only():
    tasks = needle_tasks(SENTENCES, byte_tokenizer(), length=600, depths=[0.2, 0.9], count=2, seed=4)
    assert torch.equal(tasks[0].answer_ids, tasks[2].answer_ids)
    assert sorted(tasks[0].input_ids.tolist()) == sorted(tasks[2].input_ids.tolist())
    assert not torch.equal(tasks[0].answer_ids, tasks[1].answer_ids)
    again = needle_tasks(SENTENCES, byte_tokenizer(), length=600, depths=[0.2, 0.9], count=1, seed=4)
    assert torch.equal(again[1].input_ids, tasks[2].input_ids)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"length": 100}, "length >= 128"),
        ({"depths": [1.2]}, r"depths in \[0, 1\].*\[1.2\]"),
        ({"depths": []}, "depths"),
        ({"count": 0}, "count >= 1"),
        ({"length": 50_000}, "fewer than one needle task of 50000 needs"),
    ],
)
def test_impossible_needles_are_refused(options, match):
    wanted = {"length": 600, "depths": [0.5], "count": 1, **options}
    with pytest.raises(InputError, match=match):
        needle_tasks(SENTENCES, byte_tokenizer(), **wanted)


LEAD = "The lead paragraph says in a few more than twelve words what the article is about."
ARTICLE = f"{LEAD}\n\nHistory\n\n" + "It goes on. " * 40


def test_summary_of_an_article_is_its_lead_which_the_prompt_lacks():
    (task,) = summary_tasks(make_corpus([ARTICLE]), byte_tokenizer(), count=1, max_tokens=700)
    prompt = text_of(task.input_ids)
    assert task.reference == LEAD
    assert LEAD not in prompt
    assert prompt.startswith("History\n\nIt goes on. It goes on.")
    assert "Summarize the article above" in prompt
    assert prompt.endswith("Summary:")
    assert task.input_ids[0] == START


def test_summary_of_news_in_one_paragraph_is_its_first_sentence():
    (task,) = summary_tasks(make_corpus([f"{LEAD} " + "It goes on. " * 40]), byte_tokenizer(), count=1, max_tokens=700)
    assert task.reference == LEAD
    assert text_of(task.input_ids).startswith("It goes on.")


def test_summary_by_people_is_the_reference_and_the_article_stays_whole():
    highlights = "First point of the highlights .\nSecond point , which makes it twelve words and more ."
    corpus = make_corpus([ARTICLE], references=(highlights,))
    (task,) = summary_tasks(corpus, byte_tokenizer(), count=1, max_tokens=900)
    assert task.reference == highlights
    assert text_of(task.input_ids).startswith(ARTICLE.strip())


def test_summary_prompt_is_cut_to_its_room_and_stands_in_the_chat_template():
    (task,) = summary_tasks(make_corpus([ARTICLE]), byte_tokenizer(chat_template=CHAT), count=1, max_tokens=300)
    assert len(task.input_ids) == 300
    user, end = 2, END
    assert task.input_ids[0] == user
    assert task.input_ids.tolist().count(end) == 1
    assert text_of(task.input_ids[1:9]) == "History\n"
    assert text_of(task.input_ids).endswith("Summarize the article above in one short paragraph.A:")


def test_short_articles_are_passed_over_and_too_few_are_counted():
    corpus = make_corpus([ARTICLE, "Short.\n\nVery.", f"{LEAD}\n\nToo little text.", ARTICLE.replace("lead", "first")])
    tasks = summary_tasks(corpus, byte_tokenizer(), count=2, max_tokens=700)
    assert {task.reference for task in tasks} == {LEAD, LEAD.replace("lead", "first")}
    with pytest.raises(InputError, match=r"texts has 2 articles of 128 tokens with a summary, 3 are wanted"):
        summary_tasks(corpus, byte_tokenizer(), count=3, max_tokens=700)
    with pytest.raises(InputError, match=r"max_tokens of summary tasks must be at least \d+ .*, got 150"):
        summary_tasks(corpus, byte_tokenizer(), count=1, max_tokens=150)
