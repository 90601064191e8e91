"""Tokenizers small enough to say by hand what they do: one token for each byte, and a few special ones."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BYTE_OFFSET = 3
"""Token ids: 0 is ``<s>``, 1 is ``</s>``, 2 is ``<|user|>``, and byte ``b`` is ``b + 3``."""


def byte_tokenizer(*, starts_texts: bool = False, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8; ``starts_texts``: puts ``<s>`` before every text, as LLaMA's does."""
    alphabet = _bytes_to_characters()
    vocabulary = {"<s>": 0, "</s>": 1, "<|user|>": 2}
    vocabulary |= {alphabet[byte]: byte + BYTE_OFFSET for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if starts_texts:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|user|>"],
        chat_template=chat_template,
    )


def byte_ids(text: str) -> list[int]:
    """What the byte tokenizer makes of a text, without any special token."""
    return [byte + BYTE_OFFSET for byte in text.encode()]


def _bytes_to_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself where it is printable, else the next free one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}
