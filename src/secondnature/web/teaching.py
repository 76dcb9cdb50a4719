"""The routes that teach: feedback, training, lessons, checkpoint (server; shared by every engine).

Thin: a body comes in typed, goes to the runner or the ledger, and the answer goes out typed. They run in the
thread pool, never on the event loop: completions keep streaming whatever a lesson does.
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request

from secondnature import wire
from secondnature.engines.stamps import Clock
from secondnature.lessons.feedback import Feedback, Scope
from secondnature.lessons.runner import Runner
from secondnature.records import Export, Lesson
from secondnature.web.bodies import reading
from secondnature.web.guards import KEY_SCOPE

ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": text, "model": wire.ErrorReply}
    for code, text in (
        (400, "What was sent is wrong; nothing was written"),
        (401, "No key, or the wrong one"),
        (403, "The key does not open this"),
        (404, "No such thing"),
        (409, "Not now"),
        (413, "Too large"),
        (429, "Too many at once"),
        (500, "The server's own fault"),
        (503, "Shutting down"),
        (507, "The disk refused; nothing was acknowledged"),
    )
}


def scope_of(request: Request) -> Scope:
    """What the key of a request opens, as the guards have found it."""
    return request.scope.get(KEY_SCOPE, "correct")


def router(runner: Runner, feedback: Feedback, clock: Clock) -> APIRouter:
    """All routes that teach, for any FastAPI application."""
    routes = APIRouter(responses=ERRORS, route_class=reading())

    @routes.post("/v1/feedback", response_model_exclude_none=True)
    def give(body: wire.FeedbackRequest, request: Request) -> wire.FeedbackReply:  # pyright: ignore[reportUnusedFunction]
        """Say what was wrong with an answer; durable when it answers. Sent again, it amends."""
        return feedback.give(body, scope_of(request))

    @routes.post("/v1/chat/completions/{completion_id}")
    def update(  # pyright: ignore[reportUnusedFunction]
        completion_id: str, body: wire.MetadataRequest, request: Request
    ) -> dict[str, Any]:
        """OpenAI's call that updates a stored completion: its metadata is taken as feedback."""
        reply = feedback.give(body.feedback(completion_id), scope_of(request))
        said = reply.correction.said
        message = {"role": "assistant", "content": said[0].content if said else None, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        head = {"id": completion_id, "object": "chat.completion", "created": int(time.time()), "model": ""}
        return {**head, "choices": [choice], "metadata": {**body.metadata, "correction": reply.id}}

    @routes.get("/v1/corrections", response_model_exclude_none=True)
    def corrections(states: bool = False) -> wire.CorrectionsReply:  # pyright: ignore[reportUnusedFunction]
        """The ledger as it is now, oldest first; with `states`, what has become of each."""
        ledger = feedback.ledger
        found = ledger.all()
        return wire.CorrectionsReply(
            corrections=found,
            states=feedback.states(found) if states else None,
            num_torn=ledger.num_torn or None,
            unreadable=[wire.UnreadableLine(line=n, reason=why) for n, why in ledger.unreadable] or None,
        )

    @routes.post("/v1/corrections", response_model_exclude_none=True)
    def import_corrections(body: wire.ImportRequest, request: Request) -> wire.CorrectionsReply:  # pyright: ignore[reportUnusedFunction]
        """Add or amend corrections, all or none; durable when it answers. The same record again adds nothing."""
        return feedback.take(body.corrections, scope_of(request))

    @routes.delete("/v1/corrections/{correction_id:path}", response_model_exclude_none=True)
    def delete(correction_id: str, request: Request) -> wire.DeleteReply:  # pyright: ignore[reportUnusedFunction]
        """Take a correction back: it is taught no more; durable when it answers."""
        return feedback.delete(correction_id, scope_of(request))

    @routes.post("/train", status_code=202, include_in_schema=False, response_model_exclude_none=True)
    @routes.post("/v1/train", status_code=202, response_model_exclude_none=True)
    def train(body: wire.TrainRequest) -> wire.TrainReply:  # pyright: ignore[reportUnusedFunction]
        """Start a lesson; with `dry_run`, only plan it."""
        return runner.submit(body)

    @routes.get("/train/status", include_in_schema=False, response_model_exclude_none=True)
    @routes.get("/v1/train/status", response_model_exclude_none=True)
    def status(  # pyright: ignore[reportUnusedFunction]
        job: str | None = None, after: int | None = None
    ) -> wire.JobStatus | wire.JobList:
        """How a job is doing; without `job`, all of them. `after`: with the losses of the steps after this one."""
        return runner.status(job, after) if job is not None else wire.JobList(jobs=runner.statuses())

    @routes.delete("/v1/train/{job}", response_model_exclude_none=True)
    def cancel(job: str) -> wire.JobStatus:  # pyright: ignore[reportUnusedFunction]
        """End a job; it is undone when this answers."""
        return runner.cancel(job)

    @routes.get("/v1/lessons", response_model_exclude_none=True)
    def lessons(after: int = 0) -> wire.LessonList:  # pyright: ignore[reportUnusedFunction]
        """The log, oldest first; `after`: only the entries with a higher number."""
        stamp = clock.read()
        return wire.LessonList(
            lessons=[x for x in runner.log.all() if x.number > after],
            weights_version=stamp.version,
            optimizer_version=runner.log.optimizer_version(),
            trial=stamp.trial,
        )

    @routes.post("/v1/lessons/prune", response_model_exclude_none=True)
    def prune(body: wire.PruneRequest) -> wire.PruneReply:  # pyright: ignore[reportUnusedFunction]
        """Remove old optimizer states, and deltas where that is asked for; what an undo in reach needs stays."""
        return runner.prune(body)

    @routes.post("/v1/lessons/import", status_code=202, response_model_exclude_none=True)
    def import_lesson(body: wire.ImportLessonRequest) -> wire.TrainReply:  # pyright: ignore[reportUnusedFunction]
        """Add a lesson that was taught on another server of the same base, from its file; judged like any other."""
        return runner.import_lesson(body)

    @routes.get("/v1/lessons/{lesson_id}", response_model_exclude_none=True)
    def lesson(lesson_id: str) -> wire.LessonDetail:  # pyright: ignore[reportUnusedFunction]
        """One lesson with its evidence, corrections and metrics."""
        return runner.log.detail(lesson_id)

    @routes.post("/v1/lessons/{lesson_id}/keep", response_model_exclude_none=True)
    def keep(lesson_id: str) -> Lesson:  # pyright: ignore[reportUnusedFunction]
        """Keep a lesson that is on trial."""
        return runner.keep(lesson_id)

    @routes.post("/v1/lessons/{lesson_id}/revert", response_model_exclude_none=True)
    def revert(lesson_id: str) -> Lesson:  # pyright: ignore[reportUnusedFunction]
        """Undo a lesson, to the byte; answers the entry of the log that says so."""
        return runner.revert(lesson_id)

    @routes.post("/v1/exports", response_model_exclude_none=True)
    def export(body: wire.ExportRequest) -> Export:  # pyright: ignore[reportUnusedFunction]
        """Write weights, or what changes them, to a new path of the server's machine; then it is there."""
        return runner.export(body)

    @routes.get("/v1/exports", response_model_exclude_none=True)
    def exports(lesson: str | None = None) -> wire.ExportList:  # pyright: ignore[reportUnusedFunction]
        """What left this home, oldest first; `lesson`: only what holds that one."""
        return runner.exported(lesson)

    @routes.post("/checkpoint", include_in_schema=False, response_model_exclude_none=True)
    @routes.post("/v1/checkpoint", response_model_exclude_none=True)
    def checkpoint() -> wire.CheckpointReply:  # pyright: ignore[reportUnusedFunction]
        """Make the working copy's files current now."""
        return runner.checkpoint()

    @routes.get("/v1/checkpoint", response_model_exclude_none=True)
    def checkpoint_state() -> wire.CheckpointReply:  # pyright: ignore[reportUnusedFunction]
        """What the working copy's files hold."""
        return runner.checkpoint_state()

    return routes
