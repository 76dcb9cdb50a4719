# pyright: reportMissingImports=false
"""Inside vLLM, too, the text of people is text, and an answer ends where it is taught to end (API server; law 9).

vLLM's renderer makes a chat's prompt: a template writes a text, and each control token in it is read as one,
whoever wrote it. Ours stands in its place in vLLM's registry of renderers. A chat in which somebody spells a
control token is rendered by vLLM with private characters for it, and encoded as what is taught is; every other chat
goes by.

At which tokens an answer ends vLLM reads in generation_config.json and the tokenizer, and nowhere else. It is told
those that config.json and the chat template name besides, for all requests, of users and ours.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer
from vllm.renderers.registry import RENDERER_REGISTRY

from secondnature.errors import ConfigError, ContextOverflow
from secondnature.model.rendering import Words

__all__ = ["Renderer", "install", "read_as_taught", "stop_at"]

OF_PEOPLE = ("tools", "documents")
"""What a template is told besides the messages, and people wrote."""


class Renderer(HfRenderer):
    """vLLM's renderer, to which control tokens in the words of people are text."""

    taught_with: Any = None
    """The tokenizer of lessons; None: not known yet, nothing is served."""

    def render_messages(self, messages: Any, params: Any) -> Any:
        """(conversation, prompt), as vLLM asks for them."""
        words = self._words(messages, params)
        if words is None:
            return super().render_messages(messages, params)
        rendered = super().render_messages([words.turn(m) for m in messages], _changed(params, words))
        return self._encoded(words, rendered)

    async def render_messages_async(self, messages: Any, params: Any) -> Any:
        """(conversation, prompt), as vLLM asks for them; what takes long is done beside the loop."""
        words = self._words(messages, params)  # 0.1 ms for 400,000 characters
        if words is None:
            return await super().render_messages_async(messages, params)
        turns = [words.turn(m) for m in messages]
        rendered = await super().render_messages_async(turns, _changed(params, words))
        return await asyncio.to_thread(self._encoded, words, rendered)

    def _words(self, messages: Sequence[Any], params: Any) -> Words | None:
        """The words of people; None: they hold no control token."""
        if self.taught_with is None:
            return None
        options = params.chat_template_kwargs
        words = Words(self.taught_with, [list(messages), [options.get(name) for name in OF_PEOPLE]])
        return words if words.spelled else None

    def _encoded(self, words: Words, rendered: tuple[Any, Any]) -> tuple[Any, Any]:
        """vLLM's rendering as token ids. Raises VLLMValidationError, which it answers with 400."""
        conversation, prompt = rendered
        if set(prompt) != {"prompt"} or not isinstance(prompt["prompt"], str):
            raise VLLMValidationError(
                f"a message spells {', '.join(words.spelled)}, control tokens of the model; beside what is not "
                "text they cannot be read as text"
            )
        text: str = prompt["prompt"]
        try:
            ids = words.ids(text, self.model_config.max_model_len)
        except ContextOverflow as e:
            raise VLLMValidationError(e.message, parameter="input_text", value=len(text)) from None
        return words.restored(conversation), {"prompt_token_ids": ids, "prompt": words.text(text)}


def _changed(params: Any, words: Words) -> Any:
    """vLLM's `ChatParams`, with private characters for what people wrote."""
    options = params.chat_template_kwargs
    written = {name: words.changed(options[name]) for name in OF_PEOPLE if options.get(name)}
    return dataclasses.replace(params, chat_template_kwargs={**options, "tokenize": False, **written})


def install() -> None:
    """Have vLLM render with ours from now on; later calls change nothing."""
    RENDERER_REGISTRY.renderers["hf"] = (Renderer.__module__, Renderer.__qualname__)


def read_as_taught(client: Any, tokenizer: Any) -> None:
    """From now on vLLM's `client` reads chats as `tokenizer` says.

    Raises:
        ConfigError: it renders them otherwise.
    """
    if not isinstance(client.renderer, Renderer):
        raise ConfigError(
            f"vLLM renders chats by its {type(client.renderer).__name__}, lessons by the chat template",
            "start it with --tokenizer-mode hf",
        )
    client.renderer.taught_with = tokenizer


def stop_at(client: Any, ids: Collection[int]) -> None:
    """From now on each answer of vLLM's `client` ends at these tokens, too, unless its request ignores ends."""
    known = client.input_processor.generation_config_fields
    named = known.get("eos_token_id")
    before = {named} if isinstance(named, int) else set(named or ())
    known["eos_token_id"] = sorted(before | set(ids))
