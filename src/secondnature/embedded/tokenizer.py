"""The tokenizer: byte-level BPE of 1,280 entries, trained on the generator's own text, with a chat template.

Digits stand alone (numbers of any length are spelled, not memorised), every word that fills a slot is one piece,
and names like `get_total` fall into the same pieces in the prompt and in the code. Roles and the end of a turn are
one token each: conversations here are short, and a longer frame would be a third of the text. 1,280 is a multiple
of 64, so no engine pads the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from secondnature.embedded.generator import LONG_FROM, MIX, Message, document
from secondnature.embedded.tasks import ALL_WORDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 1280
PAD, SYSTEM, USER, ASSISTANT, END = SPECIALS = (
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('found the role ' + message['role'] + '; expected system, user or assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(seed: int, num_documents: int = 20_000) -> PreTrainedTokenizerFast:
    """Train the tokenizer on the first documents of a seed (deterministic; a few seconds)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(r"[0-9]| ?[A-Za-z]+|\n +| ?[^\sA-Za-z0-9]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (m["content"] for i in range(num_documents) for m in document(seed, i, LONG_FROM, MIX))
    slots = (f" {word}" for word in ALL_WORDS for _ in range(num_documents // 40))
    inner.train_from_iterator(chain(texts, slots), trainer)
    return _wrap(inner)


def _wrap(inner: object) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        eos_token=END,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [SYSTEM, USER, ASSISTANT]})  # pyright: ignore
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a saved model directory."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def encode_document(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation and, for each, whether the assistant says it (its end marker too)."""
    ids: list[int] = []
    spoken: list[bool] = []
    end = tokenizer.convert_tokens_to_ids(END)
    for message in messages:
        assert isinstance(end, int)
        role = tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>")
        assert isinstance(role, int)
        text = tokenizer.encode(message["content"], add_special_tokens=False)
        ids += [role, *text, end]
        spoken += [False] + [message["role"] == "assistant"] * (len(text) + 1)
    return ids, spoken


def encode_texts(
    tokenizer: PreTrainedTokenizerFast, seed: int, start: int, count: int, tokens: int
) -> Iterator[tuple[list[int], list[bool]]]:
    """Encoded documents `start` to `start + count - 1` of the text that follows `tokens` training tokens."""
    return (encode_document(tokenizer, document(seed, i, tokens)) for i in range(start, start + count))
