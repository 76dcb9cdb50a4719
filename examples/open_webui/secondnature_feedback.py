"""
title: secondnature feedback
description: Thumbs, reasons, comments and edited answers become corrections of the model that gave them.
version: 1.0
"""

# An event function of Open WebUI (Admin panel > Functions). It sends each rating to the server that answered; the
# server knows what it had said there, so that an edited answer counts as what was wanted. See README.md.

import asyncio
import json
import os
import urllib.error
import urllib.request
from typing import Any

URL = os.environ.get("SECONDNATURE_URL", "http://127.0.0.1:8321")
KEY = os.environ.get("SECONDNATURE_CORRECTION_KEY", "")


async def read_feedback(feedback_id: str) -> Any:
    """Open WebUI's own record of a rating."""
    from open_webui.models.feedbacks import Feedbacks  # pyright: ignore[reportMissingImports]

    return await Feedbacks.get_feedback_by_id(feedback_id)


def as_feedback(record: Any) -> dict[str, Any] | None:
    """The body of `POST /v1/feedback`; None: nothing was rated."""
    meta, data = record.meta or {}, record.data or {}
    rating = int(data.get("rating") or 0)
    messages = record.snapshot["chat"]["chat"]["history"]["messages"]
    turns, at = [], meta["message_id"]
    while at and at in messages:
        turns.insert(0, {"role": messages[at]["role"], "content": messages[at]["content"]})
        at = messages[at].get("parentId")
    said = [data.get("reason"), data.get("comment"), ", ".join(data.get("tags") or []) if rating < 0 else ""]
    body = {
        "id": f"open-webui-{record.id}",
        "messages": turns,
        "rating": (rating > 0) - (rating < 0),
        "text": ". ".join(str(x).replace("_", " ") for x in said if x) or None,
        "source": "open-webui",
        "conversation_id": meta.get("chat_id"),
    }
    return body if rating and turns else None


def send(body: dict[str, Any]) -> Any:
    """Post it; what the server says against it is said in Open WebUI's log."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{URL}/v1/feedback", data, headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as e:
        print(f"secondnature: {e.code} {e.read().decode(errors='replace')[:500]}")
    except OSError as e:
        print(f"secondnature: {URL}: {e}")
    return None


class Event:
    """What Open WebUI calls with its events."""

    async def event(self, event: dict[str, Any]) -> Any:
        """One event; a rating that is changed later amends the correction that it made."""
        if event.get("event") not in ("feedback.created", "feedback.updated"):
            return None
        record = await read_feedback(event["subject"]["id"])
        body = as_feedback(record)
        return await asyncio.to_thread(send, body) if body is not None else None
