"""What the model reads and writes as text: tokenizer, chat template, tokens of both (server).

One door for everything that turns people's words into token ids: what is asked, taught and probed is encoded
alike. Nothing is downloaded, no code of a model directory is run. Behind it: `template` (what the template says),
`turns` (what ends one), `rendering` (text of people is text), `taught` (what gets a gradient), `lengths`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from secondnature.errors import BadCheckpoint, BadInput
from secondnature.model import turns
from secondnature.model.lengths import cannot_fit, characters_per_token
from secondnature.model.rendering import Rendering, Turn, control_tokens_in
from secondnature.model.taught import Taught, teach
from secondnature.model.turns import end_ids

__all__ = [
    "Taught",
    "Turn",
    "cannot_fit",
    "characters_per_token",
    "control_tokens_in",
    "encode_answer",
    "encode_chat",
    "encode_text",
    "end_ids",
    "end_ids_of",
    "look",
    "read_tokenizer",
    "teach",
]


def read_tokenizer(directory: Path) -> Any:
    """The tokenizer with its chat template, from the directory's files alone; what these say of ends is kept.

    Raises:
        BadCheckpoint: the files are missing or broken.
    """
    if not (directory / "tokenizer.json").exists():
        raise BadCheckpoint(f"{directory}: no tokenizer.json", "expected the files of a fast tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as e:
        if "trust_remote_code" in str(e):
            raise BadCheckpoint(
                f"{directory}: the tokenizer is made by code in the directory (auto_map), which is never run",
                "save it as a PreTrainedTokenizerFast; where its tokenizer.json says all, take auto_map out",
            ) from None
        raise BadCheckpoint(f"{directory}: tokenizer cannot be read: {e}", "export it again") from None
    turns.note(tokenizer, directory)
    return tokenizer


def end_ids_of(directory: Path) -> frozenset[int]:
    """The tokens that end an answer of the model in a directory; without a tokenizer, those that its files name."""
    try:
        return end_ids(read_tokenizer(directory))
    except BadCheckpoint:
        return turns.declared(directory)


def encode_text(tokenizer: Any, text: str, *, limit: int | None = None) -> list[int]:
    """Token ids of a plain text, with the special tokens that the tokenizer adds by itself.

    Raises:
        ContextOverflow: its length alone says that it has more than `limit` tokens.
    """
    cannot_fit(tokenizer, len(text), limit)
    return list(tokenizer(text)["input_ids"])


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Turn],
    add_generation_prompt: bool = True,
    *,
    limit: int | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation as the model's chat template renders it; nothing is added to the rendering.

    Control tokens in the messages are text: only those that the template writes are control tokens.

    Args:
        tools: that the model may call, as OpenAI's clients send them.
        template_options: what the template is told besides, such as `enable_thinking` (`chat_template_kwargs`).

    Raises:
        BadInput: the tokenizer has no chat template, or it refuses the conversation.
        ContextOverflow: the length of the rendering alone says that it has more than `limit` tokens.
    """
    rendering = Rendering(tokenizer, messages, tools=tools, options=template_options)
    return rendering.ids(rendering.prompt() if add_generation_prompt else rendering.conversation(), limit)


def encode_answer(
    tokenizer: Any,
    prompt_messages: Sequence[Turn],
    answer_message: Turn,
    *,
    limit: int | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[int]]:
    """(context_ids, continuation_ids): what is read before an answer, and the answer with its end; see `taught`.

    Raises: as `teach`.
    """
    found = teach(
        tokenizer, prompt_messages, answer_message, limit=limit, tools=tools, options=template_options
    )
    return found.context, found.continuation


def look(tokenizer: Any) -> list[str]:
    """Render and encode one turn; what is wrong with the tokenizer's files or the template, a sentence each."""
    wrong: list[str] = []
    turn = [{"role": "user", "content": "Hello."}]
    try:
        teach(tokenizer, turn, {"role": "assistant", "content": "Good day."})
    except BadInput as e:
        wrong.append(f"{e.message} ({e.hint})" if e.hint else e.message)
    if not end_ids(tokenizer):
        wrong.append(
            "nothing ends an answer: set `eos_token_id` in generation_config.json to the token that does"
        )
    return wrong
