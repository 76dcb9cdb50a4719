"""The one way in which our own programs talk to a server: CLI, tests, users use the same door (client)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Self, cast
from urllib.parse import quote

import httpx2
from pydantic import BaseModel

from secondnature import errors
from secondnature.records import Correction, Export, Lesson
from secondnature.wire.bodies import (
    CheckpointReply,
    CorrectionsReply,
    DeleteReply,
    ExportList,
    ExportRequest,
    FeedbackReply,
    FeedbackRequest,
    Health,
    ImportLessonRequest,
    ImportRequest,
    JobStatus,
    LessonDetail,
    LessonList,
    PruneReply,
    PruneRequest,
    TrainReply,
    TrainRequest,
    Wiring,
)

LONG_S = 3600.0
"""For what takes as long as the disk needs for all weights."""
ENGINES_OWN = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/models"})
"""What vLLM answers itself, with errors of its own shape."""


def _engines_own_error(status: int, error: Any) -> errors.SecondnatureError:
    """vLLM's `{message, type, param, code}`, or a word, as the error of ours that has this status."""
    said = cast("dict[str, Any]", error) if isinstance(error, dict) else {}
    message = str(said.get("message", error))
    if status == 401:
        return errors.Unauthorized(
            f"the engine's own routes need a key: {message}",
            "set SECONDNATURE_API_KEY, or give vLLM's --api-key",
        )
    if status == 400 and ("max_model_len" in message or "context length" in message):
        return errors.ContextOverflow(message, "ask for less, or start vLLM with a longer --max-model-len")
    kinds: dict[int, type[errors.SecondnatureError]] = {
        400: errors.BadInput,
        404: errors.NotFound,
        422: errors.BadInput,
        429: errors.Busy,
        503: errors.Unreachable,
    }
    return kinds.get(status, errors.SecondnatureError)(message, "the engine said so; see its log")


class Client:
    """Talks to a secondnature server; every answer is a typed record, every error one of `errors`.

    Use as a context manager. `key` is the server's key (`SECONDNATURE_API_KEY`, or `<home>/key`).
    """

    def __init__(self, url: str, key: str | None = None, *, timeout_s: float = 60.0) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.url = url.rstrip("/")
        self._http = httpx2.Client(base_url=self.url, headers=headers, timeout=timeout_s, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        body: BaseModel | dict[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """One call: the decoded JSON answer. `timeout_s`: None, the client's own.

        Raises:
            Unreachable: nobody answers there.
            SecondnatureError: what the server said, as the exception that it was.
        """
        return self._read(self._send(method, path, body, timeout_s))

    def _send(
        self,
        method: str,
        path: str,
        body: BaseModel | dict[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> httpx2.Response:
        sent: dict[str, Any] = {"json": body}
        if isinstance(body, BaseModel):
            sent = {
                "content": body.model_dump_json(exclude_none=True).encode(),
                "headers": {"content-type": "application/json"},
            }
        if timeout_s is not None:
            sent["timeout"] = timeout_s
        try:
            return self._http.request(method, path, **sent)
        except httpx2.TimeoutException:
            raise errors.Unreachable(
                f"{self.url}{path}: no answer in time", "is the server overloaded?"
            ) from None
        except httpx2.TransportError as e:
            raise errors.Unreachable(f"{self.url}: {e}", "start one with `secondnature serve`") from None

    def _read(self, response: httpx2.Response, *, unwell: bool = False) -> Any:
        """The answer; `unwell`: also one that says 503 and is no error."""
        try:
            answer = response.json()
        except ValueError:
            raise errors.Unreachable(
                f"{response.request.url}: status {response.status_code}, not JSON",
                "is that a secondnature server?",
            ) from None
        if response.is_error:
            said = cast("dict[str, Any]", answer) if isinstance(answer, dict) else {}
            if unwell and response.status_code == 503 and "weights_version" in said:
                return said
            error: Any = said.get("error", answer)
            if isinstance(error, dict) and "hint" in error:
                raise errors.from_wire(cast("dict[str, Any]", error))
            if response.request.url.path not in ENGINES_OWN:
                raise self._stranger(response)
            raise _engines_own_error(response.status_code, error)
        return answer

    def _stranger(self, response: httpx2.Response) -> errors.Unreachable:
        """Who answers where one of our routes should: a vLLM without the plug-in, or something else."""
        path = response.request.url.path
        version = self._said("/version", "version")
        if isinstance(version, str) and self._said("/v1/health", "weights_version") is None:
            return errors.Unreachable(
                f"vLLM {version} answers at {self.url} without secondnature",
                "start it with VLLM_PLUGINS=secondnature, or by `secondnature serve --engine vllm`",
            )
        return errors.Unreachable(
            f"{self.url}{path}: status {response.status_code}, not an answer of secondnature",
            "is that a secondnature server, and of this version?",
        )

    def _said(self, path: str, field: str) -> Any:
        """A field of an open route's answer, or None."""
        try:
            found: Any = self._http.get(path).json()
        except (ValueError, httpx2.HTTPError):
            return None
        return cast("dict[str, Any]", found).get(field) if isinstance(found, dict) else None

    def health(self) -> Health:
        """Is it there, what does it serve, and is it well? One that is not well (503) answers too."""
        return Health.model_validate(self._read(self._send("GET", "/v1/health"), unwell=True))

    def wiring(self) -> Wiring:
        """Does the engine compute with the memory that lessons are written into?"""
        return Wiring.model_validate(self.request("GET", "/v1/wiring"))

    def complete(self, prompt: str | list[int], **options: Any) -> dict[str, Any]:
        """One completion of a text or of token ids, whole."""
        return self.request("POST", "/v1/completions", body={"prompt": prompt, **options})

    def chat(self, messages: list[dict[str, str]], **options: Any) -> dict[str, Any]:
        """One chat completion, whole."""
        return self.request("POST", "/v1/chat/completions", body={"messages": messages, **options})

    def chat_stream(self, messages: list[dict[str, str]], **options: Any) -> Iterator[dict[str, Any]]:
        """One chat completion, chunk by chunk."""
        body = {"messages": messages, "stream": True, **options}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                    self._read(response)
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        chunk = json.loads(line.removeprefix("data: "))
                        if "error" in chunk:
                            raise errors.from_wire(chunk["error"])
                        yield chunk
        except httpx2.TransportError as e:
            raise errors.Unreachable(f"{self.url}: {e}", "is the server still running?") from None

    def feedback(self, body: FeedbackRequest) -> FeedbackReply:
        """Record what the user thinks of a completion; durable when this returns."""
        return FeedbackReply.model_validate(self.request("POST", "/v1/feedback", body=body))

    def ledger(self, *, states: bool = False) -> CorrectionsReply:
        """The ledger, and what of it could not be read; with `states`, what has become of each correction."""
        asked = f"?states={str(states).lower()}"
        return CorrectionsReply.model_validate(self.request("GET", "/v1/corrections" + asked))

    def corrections(self) -> list[Correction]:
        """The corrections of the ledger."""
        return self.ledger().corrections

    def import_corrections(self, corrections: list[Correction]) -> CorrectionsReply:
        """Add corrections to the ledger, all or none; durable when this returns. Says what became of each."""
        body = ImportRequest(corrections=corrections)
        return CorrectionsReply.model_validate(self.request("POST", "/v1/corrections", body=body))

    def delete_correction(self, identifier: str) -> DeleteReply:
        """Take a correction back; the lessons that taught it are named."""
        quoted = quote(identifier, safe="")
        return DeleteReply.model_validate(self.request("DELETE", f"/v1/corrections/{quoted}"))

    def train(self, body: TrainRequest) -> TrainReply:
        """Start a lesson (or plan it: `dry_run`); one with an `idempotency_key` can be repeated safely."""
        return TrainReply.model_validate(self.request("POST", "/v1/train", body=body))

    def status(self, job: str, after: int | None = None) -> JobStatus:
        """How a job is doing; `after`: with the losses of the steps after this one."""
        since = "" if after is None else f"&after={after}"
        return JobStatus.model_validate(self.request("GET", f"/v1/train/status?job={job}{since}"))

    def cancel(self, job: str) -> JobStatus:
        """End a job; its writes are undone."""
        return JobStatus.model_validate(self.request("DELETE", f"/v1/train/{job}"))

    def lessons(self) -> LessonList:
        """The log."""
        return LessonList.model_validate(self.request("GET", "/v1/lessons"))

    def lesson(self, lesson_id: str) -> LessonDetail:
        """One lesson, with its evidence and metrics."""
        return LessonDetail.model_validate(self.request("GET", f"/v1/lessons/{lesson_id}"))

    def keep(self, lesson_id: str) -> Lesson:
        """Keep a lesson that is on trial."""
        return Lesson.model_validate(self.request("POST", f"/v1/lessons/{lesson_id}/keep"))

    def revert(self, lesson_id: str) -> Lesson:
        """Undo a lesson to the byte; the entry of the log that says so."""
        return Lesson.model_validate(
            self.request("POST", f"/v1/lessons/{lesson_id}/revert", timeout_s=LONG_S)
        )

    def prune(self, body: PruneRequest) -> PruneReply:
        """Remove what no undo within reach needs, or say what that would be."""
        return PruneReply.model_validate(
            self.request("POST", "/v1/lessons/prune", body=body, timeout_s=LONG_S)
        )

    def checkpoint(self) -> CheckpointReply:
        """Bring the working copy up to date now."""
        return CheckpointReply.model_validate(self.request("POST", "/v1/checkpoint", timeout_s=LONG_S))

    def checkpoint_state(self) -> CheckpointReply:
        """What the working copy holds, and how far a new one is."""
        return CheckpointReply.model_validate(self.request("GET", "/v1/checkpoint"))

    def import_lesson(self, body: ImportLessonRequest) -> TrainReply:
        """Add a lesson that was taught elsewhere: it is applied and judged like any other."""
        reply = self.request("POST", "/v1/lessons/import", body=body, timeout_s=LONG_S)
        return TrainReply.model_validate(reply)

    def export(self, body: ExportRequest) -> Export:
        """Write weights, or what changes them, to a path of the server's machine; it is there when this returns."""
        return Export.model_validate(self.request("POST", "/v1/exports", body=body, timeout_s=LONG_S))

    def exports(self, lesson: str | None = None) -> ExportList:
        """Every export, and how far the present one is; `lesson`: those that hold it."""
        asked = "" if lesson is None else f"?lesson={quote(lesson, safe='')}"
        return ExportList.model_validate(self.request("GET", "/v1/exports" + asked))
