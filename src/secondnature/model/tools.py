"""Whether a chat template shows tools to the model, and turns with calls as templates expect them (server).

Most templates of small models show none: then tools are refused where they would be lost silently.
"""

from __future__ import annotations

import weakref
from typing import Any

from jinja2 import TemplateError

__all__ = ["takes_tools"]

_KNOWN: weakref.WeakKeyDictionary[Any, tuple[str, bool]] = weakref.WeakKeyDictionary()
"""The template of each tokenizer that was looked at, and what was found."""
_NAME = "a_tool_that_is_looked_for"
_TOOL = {
    "type": "function",
    "function": {"name": _NAME, "description": "", "parameters": {"type": "object", "properties": {}}},
}


def takes_tools(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template writes the tools that it is given: one is rendered and looked for."""
    template = repr(getattr(tokenizer, "chat_template", None))
    known = _KNOWN.get(tokenizer)
    if known is not None and known[0] == template:
        return known[1]
    try:
        shown = tokenizer.apply_chat_template(
            [{"role": "user", "content": "?"}], tools=[_TOOL], tokenize=False, add_generation_prompt=True
        )
        found = _NAME in str(shown)
    except (TemplateError, ValueError, TypeError):  # what else it says to real turns comes with these
        found = False
    _KNOWN[tokenizer] = (template, found)
    return found
