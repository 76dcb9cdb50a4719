"""
title: secondnature feedback
description: Thumbs, reasons, comments and edited answers become corrections of the model that gave them.
version: 1.1
"""

# An event function of Open WebUI (Admin panel > Functions). It sends each rating to the server that answered; the
# server knows what it had said there, so that an edited answer counts as what was wanted. See README.md.

import asyncio
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from pydantic import BaseModel, Field

REASONS = {"dont": "don't", "didnt": "didn't", "shouldnt": "shouldn't"}
"""Open WebUI's names of reasons have no apostrophes; what is recorded is read by a model."""


async def read_feedback(feedback_id: str) -> Any:
    """Open WebUI's own record of a rating."""
    from open_webui.models.feedbacks import Feedbacks  # pyright: ignore[reportMissingImports]

    return await Feedbacks.get_feedback_by_id(feedback_id)


async def read_ratings(chat_id: str) -> list[Any]:
    """The ratings of a chat."""
    from open_webui.models.feedbacks import Feedbacks  # pyright: ignore[reportMissingImports]

    return await Feedbacks.get_feedbacks_by_chat_id(chat_id)


async def read_messages(chat_id: str) -> dict[str, Any]:
    """The messages of a chat as they are now, by id."""
    from open_webui.models.chats import Chats  # pyright: ignore[reportMissingImports]

    chat = await Chats.get_chat_by_id(chat_id)
    return messages_of(chat.chat) if chat is not None else {}


def messages_of(chat: dict[str, Any]) -> dict[str, Any]:
    """The messages of a chat by id: a tree, each with its parent's id."""
    return chat.get("history", {}).get("messages") or {}


def when_rated(record: Any) -> dict[str, Any]:
    """The messages of the chat when the rating was given."""
    return messages_of((record.snapshot or {}).get("chat", {}).get("chat", {}))


def is_edited(record: Any, messages: dict[str, Any]) -> bool:
    """Whether the answer that was rated is another one now."""
    at = str((record.meta or {}).get("message_id"))
    before, now = when_rated(record).get(at), messages.get(at)
    return bool(before and now and before["content"] != now["content"])


def as_feedback(record: Any, messages: dict[str, Any]) -> dict[str, Any] | None:
    """The body of `POST /v1/feedback`; None: nothing was rated."""
    meta, data = record.meta or {}, record.data or {}
    rating = int(data.get("rating") or 0)
    turns, at = [], meta.get("message_id")
    while at and at in messages:
        turns.insert(0, {"role": messages[at]["role"], "content": messages[at]["content"]})
        at = messages[at].get("parentId")
    reason = " ".join(REASONS.get(word, word) for word in str(data.get("reason") or "").split("_"))
    said = [reason, data.get("comment"), ", ".join(data.get("tags") or []) if rating < 0 else ""]
    body = {
        "id": name_of(record.id),
        "messages": turns,
        "rating": (rating > 0) - (rating < 0),
        "text": ". ".join(str(x) for x in said if x) or None,
        "source": "open-webui",
        "conversation_id": meta.get("chat_id"),
    }
    return body if rating and turns else None


def name_of(feedback_id: str) -> str:
    """What a rating's correction is called in the ledger."""
    return f"open-webui-{feedback_id}"


class Event:
    """What Open WebUI calls with its events."""

    class Valves(BaseModel):
        """Set in Open WebUI: Admin panel > Functions > the gear."""

        url: str = Field(
            default=os.environ.get("SECONDNATURE_URL", "http://127.0.0.1:8321"), description="Of the server."
        )
        correction_key: str = Field(
            default=os.environ.get("SECONDNATURE_CORRECTION_KEY", ""),
            description="The content of the file `correction_key` in the server's home.",
            json_schema_extra={"input": {"type": "password"}},
        )

    def __init__(self) -> None:
        self.valves = self.Valves()

    async def event(self, event: dict[str, Any]) -> Any:
        """One event; what is changed later amends the correction that was made, what is deleted takes it back."""
        name, subject = event.get("event"), str((event.get("subject") or {}).get("id"))
        if name in ("feedback.created", "feedback.updated"):
            record = await read_feedback(subject)
            return await self.tell(record, when_rated(record))
        if name == "feedback.deleted":
            return await asyncio.to_thread(self.send, "DELETE", f"/v1/corrections/{name_of(subject)}", None)
        if name == "chat.updated":  # an answer may have been edited after it was rated
            records = await read_ratings(subject)
            messages = await read_messages(subject) if records else {}
            told = [await self.tell(x, messages) for x in records if is_edited(x, messages)]
            return told[-1] if told else None
        return None

    async def tell(self, record: Any, messages: dict[str, Any]) -> Any:
        """Send a rating with the conversation that it is about."""
        body = as_feedback(record, messages)
        return await asyncio.to_thread(self.send, "POST", "/v1/feedback", body) if body is not None else None

    def send(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """Ask the server; what it says against it is said in Open WebUI's log."""
        headers = {
            "content-type": "application/json",
            "authorization": f"Bearer {self.valves.correction_key}",
        }
        data = None if body is None else json.dumps(body).encode()
        url = self.valves.url.rstrip("/").removesuffix("/v1") + urllib.parse.quote(path)
        request = urllib.request.Request(url, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as e:
            print(f"secondnature: {e.code} {e.read().decode(errors='replace')[:500]}")
        except OSError as e:
            print(f"secondnature: {url}: {e}")
        return None
