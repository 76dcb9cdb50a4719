"""Exports of chat applications: ChatGPT, Open WebUI, LibreChat, Claude: trees of turns (client).

From a message that somebody rated, regenerated or objected to, the path to the root is the conversation. All
that is found here is a candidate: a program read it out of a chat, and a person has to say that it was meant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from secondnature.importers.objections import objects
from secondnature.importers.rows import Context, Draft, Refused, Turn, Vote
from secondnature.importers.turns import NO_TOOLS, as_object, rating_of, text_of

MAX_TURNS = 200


@dataclass
class Node:
    """One message of a tree."""

    id: str
    role: str
    """user, assistant, system; anything else is passed over on the path."""
    text: str
    parent: str | None
    children: list[str] = field(default_factory=list[str])
    vote: Vote | None = None


Tree = dict[str, Node]


def candidates(tree: Tree, current: str | None, context: Context) -> list[Draft]:
    """What a tree says about its answers, each once: thumbs, then regenerated answers, then objections."""
    chain = set(_ids_up(tree, current))
    found: list[Draft] = []
    for node in tree.values():
        if node.role != "assistant" or not node.text.strip():
            continue
        path = path_to(tree, node)
        if path is None:
            continue
        better = _regenerated(tree, node, chain)
        reply = _objection(tree, node, chain)
        rating = node.vote.rating if node.vote is not None else None
        comment = node.vote.comment if node.vote is not None else None
        if rating is not None and rating > 0:
            found.append(Draft(path, node.text, node.text, None, comment, 1, node.id, candidate=True))
        elif rating is not None or comment:
            said_why = comment or reply
            found.append(Draft(path, node.text, better, None, said_why, rating, node.id, candidate=True))
        elif better is not None:
            found.append(Draft(path, node.text, better, None, None, None, node.id, candidate=True))
        elif reply is not None:
            found.append(Draft(path, node.text, None, None, reply, None, node.id, candidate=True))
    if not found:
        context.pass_over("chats without a rating, a second answer or an objection")
    return found


def _ids_up(tree: Tree, identifier: str | None) -> Iterator[str]:
    seen: set[str] = set()
    while identifier is not None and identifier in tree and identifier not in seen:
        seen.add(identifier)
        yield identifier
        identifier = tree[identifier].parent


def path_to(tree: Tree, node: Node) -> list[Turn] | None:
    """The turns before a message, from the root; None: nobody asked, or tools answered in between."""
    turns: list[Turn] = []
    for identifier in _ids_up(tree, node.parent):
        one = tree[identifier]
        if one.role == "tool":
            return None
        if one.role in ("user", "assistant", "system") and one.text.strip():
            turns.append({"role": one.role, "content": one.text})
    turns.reverse()
    if not turns or turns[-1]["role"] != "user":
        return None
    return turns[-MAX_TURNS:]


def _regenerated(tree: Tree, node: Node, chain: set[str]) -> str | None:
    """The answer that took this one's place: the sibling with which the talk went on."""
    parent = tree.get(node.parent or "")
    if parent is None or node.id in chain:
        return None
    for identifier in parent.children:
        one = tree.get(identifier)
        rated_down = one is not None and one.vote is not None and one.vote.rating < 0
        if one is not None and identifier in chain and one.role == "assistant" and not rated_down:
            return one.text if one.text.strip() and one.text != node.text else None
    return None


def _objection(tree: Tree, node: Node, chain: set[str]) -> str | None:
    """What the user said next, if it begins like an objection."""
    for identifier in sorted(node.children, key=lambda c: c not in chain):
        one = tree.get(identifier)
        if one is not None and one.role == "user" and objects(one.text):
            return one.text
    return None


def from_chatgpt(row: dict[str, Any], context: Context) -> list[Draft]:
    """A conversation of conversations.json; thumbs of message_feedback.json, where that file was given too."""
    tree: Tree = {}
    for key, one in as_object(row["mapping"]).items():
        node = as_object(one)
        message = as_object(node.get("message"))
        role = str(as_object(message.get("author")).get("role", ""))
        recipient = message.get("recipient", "all")
        hidden = as_object(message.get("metadata")).get("is_visually_hidden_from_conversation") is True
        text = "" if hidden or recipient != "all" else _chatgpt_text(message.get("content"))
        children = [str(c) for c in cast("list[Any]", node.get("children") or [])]
        parent = node.get("parent")
        vote = context.votes.get(str(message.get("id"))) or context.votes.get(key)
        context.num_votes_used += vote is not None
        tree[key] = Node(key, role, text, str(parent) if parent is not None else None, children, vote)
    current = row.get("current_node")
    return candidates(tree, str(current) if current is not None else None, context)


def _chatgpt_text(content: Any) -> str:
    found = as_object(content)
    if found.get("content_type") not in (None, "text", "multimodal_text"):
        return ""
    return "".join(p for p in cast("list[Any]", found.get("parts") or []) if isinstance(p, str))


def read_vote(row: dict[str, Any], context: Context) -> list[Draft]:
    """A line of message_feedback.json: noted for the conversation that it belongs to."""
    rating = rating_of(row["rating"])
    content = row.get("content")
    if isinstance(content, str) and content[:1] == "{":
        try:
            content = json.loads(content)
        except (ValueError, RecursionError):
            content = None
    comment = as_object(content).get("text")
    tags = as_object(content).get("tags")
    if not (isinstance(comment, str) and comment.strip()) and isinstance(tags, list):
        comment = ", ".join(t.replace("-", " ") for t in cast("list[Any]", tags) if isinstance(t, str))
    if rating is not None:
        key = str(row.get("message_id", row.get("id")))
        context.votes[key] = Vote(rating, comment if isinstance(comment, str) and comment.strip() else None)
    return []


def _open_webui_tree(chat: Any) -> tuple[Tree, str | None]:
    history = as_object(as_object(chat).get("history"))
    tree: Tree = {}
    for key, one in as_object(history.get("messages")).items():
        message = as_object(one)
        said = as_object(message.get("annotation"))
        rating = rating_of(said.get("rating"))
        comment = _words(said)
        vote = Vote(rating, comment) if rating is not None else None
        children = [str(c) for c in cast("list[Any]", message.get("childrenIds") or [])]
        parent = message.get("parentId")
        role, text = str(message.get("role")), text_of(message.get("content"))
        if role == "assistant":
            role = "tool" if _CALLS.search(text) else role
            text = _DETAILS.sub("", text).strip()
        tree[key] = Node(key, role, text, str(parent) if parent else None, children, vote)
    current = history.get("currentId")
    return tree, str(current) if current else None


_CALLS = re.compile(r'<details\b[^>]*type="(tool_calls|code_interpreter)"')
_DETAILS = re.compile(r'<details\b[^>]*type="reasoning"[^>]*>.*?</details>\s*', re.DOTALL)
"""How Open WebUI keeps in an answer what the model thought, and what tools did."""


def _words(said: dict[str, Any]) -> str | None:
    """A comment, else the reason that was ticked."""
    for key in ("comment", "reason"):
        if isinstance(said.get(key), str) and said[key].strip():
            return said[key].replace("_", " ") if key == "reason" else said[key]
    return None


def from_open_webui_chat(row: dict[str, Any], context: Context) -> list[Draft]:
    """A chat of Open WebUI's export."""
    tree, current = _open_webui_tree(row.get("chat", row))
    if not tree:
        raise Refused("a chat without messages")
    return candidates(tree, current, context)


def from_open_webui_feedback(row: dict[str, Any], context: Context) -> list[Draft]:
    """A line of Open WebUI's feedback export: the rated message in the snapshot of its chat."""
    data, meta = as_object(row["data"]), as_object(row.get("meta"))
    rating = rating_of(data.get("rating"))
    if rating is None:
        context.pass_over("feedback without a rating")
        return []
    chat = as_object(as_object(row.get("snapshot")).get("chat"))
    tree, current = _open_webui_tree(chat.get("chat", chat))
    node = tree.get(str(meta.get("message_id")))
    if node is None:
        raise Refused("the rated message is not in the snapshot of its chat")
    path = path_to(tree, node)
    if path is None or not node.text.strip():
        raise Refused("the rated message answers no question of a user, or tools came before it")
    better = _regenerated(tree, node, set(_ids_up(tree, current))) if rating < 0 else node.text
    key = str(row.get("id") or node.id)
    return [Draft(path, node.text, better, None, _words(data), rating, key, candidate=True)]


def from_librechat(row: dict[str, Any], context: Context) -> list[Draft]:
    """A conversation of LibreChat: a list with `parentMessageId`, or a tree of `children`."""
    tree: Tree = {}
    waiting: list[tuple[Any, str | None]] = [(m, None) for m in cast("list[Any]", row["messages"])]
    last = None
    while waiting:
        one, above = waiting.pop(0)
        message = as_object(one)
        key = str(message.get("messageId"))
        parent = str(message.get("parentMessageId") or above or "") or None
        thumb = as_object(message.get("feedback"))
        rating = rating_of(thumb.get("rating"))
        words = thumb.get("text")
        tag = thumb.get("tag")
        tag = as_object(tag).get("key") if isinstance(tag, dict) else tag
        comment = words if isinstance(words, str) and words.strip() else tag if isinstance(tag, str) else None
        text = message.get("text") or _parts(message.get("content"))
        role = "user" if message.get("isCreatedByUser") or message.get("sender") == "User" else "assistant"
        role = "tool" if _has_part(message.get("content"), "tool_call") else role
        vote = Vote(rating, comment) if rating is not None else None
        tree[key] = Node(key, role, str(text or ""), parent, vote=vote)
        waiting += [(c, key) for c in cast("list[Any]", message.get("children") or [])]
        last = key
    _note_children(tree)
    return candidates(tree, last, context)


def _parts(content: Any) -> str:
    if not isinstance(content, list):
        return ""
    pieces = [as_object(p) for p in cast("list[Any]", content)]
    return "".join(text_of(p.get("text")) for p in pieces if p.get("type") == "text")


def _has_part(content: Any, *kinds: str) -> bool:
    pieces = cast("list[Any]", content) if isinstance(content, list) else []
    return any(as_object(p).get("type") in kinds for p in pieces)


def _note_children(tree: Tree) -> None:
    for node in tree.values():
        above = tree.get(node.parent or "")
        if above is not None:
            above.children.append(node.id)


def from_claude(row: dict[str, Any], context: Context) -> list[Draft]:
    """A conversation of Claude's export (`chat_messages`), in a line, or a tree by `parent_message_uuid`."""
    tree: Tree = {}
    last: str | None = None
    for i, one in enumerate(cast("list[Any]", row["chat_messages"])):
        message = as_object(one)
        key = str(message.get("uuid", i))
        role = "user" if message.get("sender") == "human" else "assistant"
        if _has_part(message.get("content"), "tool_use", "tool_result"):
            role = "tool"
        text = _parts(message.get("content")) or text_of(message.get("text"))
        parent = message.get("parent_message_uuid")
        tree[key] = Node(key, role, text, str(parent) if parent in tree else last)
        last = key
    if tree and all(n.role == "tool" for n in tree.values() if n.role != "user"):
        raise Refused(NO_TOOLS)
    _note_children(tree)
    return candidates(tree, last, context)
