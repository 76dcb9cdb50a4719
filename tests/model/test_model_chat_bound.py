"""A text is refused by its length only if no encoding of it could fit: held against several kinds of tokenizers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_server import save_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import secondnature.embedded
from secondnature.errors import ContextOverflow
from secondnature.model.chat import (
    cannot_fit,
    characters_per_token,
    encode_answer,
    encode_chat,
    encode_text,
    read_tokenizer,
)

BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
LETTERS = {c: 300 + i for i, c in enumerate("abcdefgh\u2581\u00e9\u1f82")}


def wrap(core: Any) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)


def sentencepiece() -> Any:
    """As Llama's and Gemma's: spaces become a sign, what is unknown becomes bytes."""
    merges = [("a", "b"), ("ab", "ab")]
    vocabulary = {**BYTES, **LETTERS, "ab": 400, "abab": 401, "<unk>": 402}
    core = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )  # pyright: ignore[reportAttributeAccessIssue]
    return wrap(core)


def composing() -> Any:
    """As Qwen's: NFC makes one character of up to four."""
    alphabet = {c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    greek = "".join(
        c
        for c, _ in pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(
            "\u1f82"
        )
    )
    merges, made = list[tuple[str, str]](), greek[0]
    for c in greek[1:]:
        merges.append((made, c))
        made += c
        alphabet[made] = len(alphabet)
    core = Tokenizer(models.BPE(vocab=alphabet, merges=merges))
    core.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.add_special_tokens([AddedToken("<|a long special one|>")])
    return wrap(core)


def unknown_letters() -> Any:
    """Every unknown character is a token of its own."""
    core = Tokenizer(models.BPE(vocab={**LETTERS, "<unk>": 0}, merges=[], unk_token="<unk>"))
    core.normalizer = normalizers.NFKC()  # pyright: ignore[reportAttributeAccessIssue]
    return wrap(core)


def shortening() -> Any:
    """A normalizer that makes one character of three."""
    core = Tokenizer(models.BPE(vocab={**LETTERS, "<unk>": 0}, merges=[], unk_token="<unk>"))
    core.normalizer = normalizers.Replace("abc", "d")  # pyright: ignore[reportAttributeAccessIssue]
    return wrap(core)


def built(directory: Path) -> Any:
    save_tokenizer(directory)
    return read_tokenizer(directory)


def byte_level(change: Callable[[Any], None]) -> Any:
    """A tokenizer of bytes, to which one thing was done that drops text."""
    core = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    change(core)
    return wrap(core)


def fused() -> Any:
    core = Tokenizer(models.BPE(vocab={**LETTERS, "<unk>": 0}, merges=[], unk_token="<unk>", fuse_unk=True))
    return wrap(core)


def removing(core: Any) -> None:
    parts = [pre_tokenizers.Split(Regex(r"\s+"), "removed"), core.pre_tokenizer]
    core.pre_tokenizer = pre_tokenizers.Sequence(parts)


BOUND: dict[str, tuple[Callable[[], Any], int]] = {
    "sentencepiece": (sentencepiece, 6),
    "composing": (composing, 4 * 22),
    "unknown letters": (unknown_letters, 4 * 5),
    "shortening": (shortening, 3 * 5),
}
FREE: dict[str, tuple[Callable[[], Any], str]] = {
    "strips": (lambda: byte_level(lambda c: setattr(c, "normalizer", normalizers.Strip())), " "),
    "drops accents": (
        lambda: byte_level(lambda c: setattr(c, "normalizer", normalizers.StripAccents())),
        "\u0301",
    ),
    "deletes": (lambda: byte_level(lambda c: setattr(c, "normalizer", normalizers.Replace("x", ""))), "x"),
    "splits and removes": (lambda: byte_level(removing), " "),
    "a special token that swallows spaces": (
        lambda: byte_level(lambda c: c.add_special_tokens([AddedToken("<s>", rstrip=True, lstrip=True)])),
        " ",
    ),
    "fused unknowns": (fused, "z"),
    "whole words": (lambda: wrap(Tokenizer(models.WordLevel(vocab={"<unk>": 0}, unk_token="<unk>"))), "z"),
    "an alphabet with holes": (lambda: wrap(Tokenizer(models.BPE(vocab=dict(LETTERS), merges=[]))), "z"),
}
PIECES = st.sampled_from(
    [
        *("a", "ab", "abab", "abc", "h", " ", "   ", "\n", "\t", "\u2581", "z", "Use tea.", "Why not dots?"),
        *(
            "\u03b1\u0313\u0300\u0345",
            "e\u0301",
            "\u0301",
            "\u1112\u1161\u11ab",
            "\ufb03",
            "\u65e5",
            "\U0001f642",
        ),
        *("<|assistant|>", "<|end|>", "<|a long special one|>", "<s>", "<unk>", "<0x41>", "\u0130", "\x00"),
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=8), max_size=30).map("".join)


@pytest.fixture(scope="module")
def talkers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return built(tmp_path_factory.mktemp("tokenizer"))


def holds(tokenizer: Any, *texts: str) -> None:
    """A text is not refused where as many tokens are allowed as it has."""

    def is_let_through(text: str) -> None:
        num_tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        cannot_fit(tokenizer, len(text), num_tokens)

    settings(max_examples=200, deadline=None)(given(TEXTS)(is_let_through))()
    for text in texts:
        is_let_through(text)


@pytest.mark.parametrize("name", BOUND)
def test_a_text_that_fits_is_never_refused(name: str) -> None:
    make, bound = BOUND[name]
    tokenizer = make()
    assert characters_per_token(tokenizer) == bound
    holds(tokenizer)
    with pytest.raises(
        ContextOverflow, match=rf"10 tokens; a text of {10 * bound + 1} characters has 11 or more"
    ):
        encode_text(tokenizer, "a" * (10 * bound + 1), limit=10)


def test_nor_is_one_of_the_models_here(talkers: Any) -> None:
    for tokenizer in (talkers, read_tokenizer(secondnature.embedded.path())):
        assert characters_per_token(tokenizer) == len("<|assistant|>")
        holds(tokenizer, "<|assistant|>" * 50)  # the bound itself


@pytest.mark.parametrize("name", FREE)
def test_where_text_may_vanish_nothing_is_refused_by_its_length(name: str) -> None:
    make, vanishing = FREE[name]
    tokenizer = make()
    assert characters_per_token(tokenizer) is None
    text = f"<s>{vanishing * 5000}" + ("<s>" if name.startswith("a special") else "")
    assert len(encode_text(tokenizer, text, limit=10)) <= 10


def test_nor_with_a_real_tokenizer_that_drops_what_it_does_not_know() -> None:
    root = os.environ.get("SECONDNATURE_REALDATA")
    if not root:
        pytest.skip("SECONDNATURE_REALDATA is not set: no real tokenizer here")
    tokenizer = read_tokenizer(Path(root) / "models" / "craftgpt-chat")
    assert characters_per_token(tokenizer) is None
    assert len(encode_text(tokenizer, "hi" + "\u65e5" * 100_000, limit=64)) <= 64


def test_the_rendering_is_measured_not_what_was_sent(talkers: Any, tmp_path: Path) -> None:
    tokenizer = built(tmp_path)  # its template will trim
    trimmed = tokenizer.chat_template.replace("m.content", "m.content | trim")
    message = [{"role": "user", "content": " " * 100_000 + "Use tea."}]
    with pytest.raises(ContextOverflow, match=r"100,0\d\d characters"):
        encode_chat(tokenizer, message, limit=256)
    with pytest.raises(ContextOverflow):
        encode_answer(
            tokenizer,
            [{"role": "user", "content": "a"}],
            {"role": "assistant", "content": "b" * 9999},
            limit=256,
        )
    tokenizer.chat_template = trimmed
    short = encode_chat(talkers, [{"role": "user", "content": "Use tea."}])
    assert encode_chat(tokenizer, message, limit=256) == short
    assert encode_chat(talkers, [{"role": "user", "content": "a" * 4000}], limit=None)  # no limit, no bound
