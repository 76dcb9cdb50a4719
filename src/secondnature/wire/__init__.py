"""Every message that crosses a boundary, and the client (any process).

HTTP bodies are pydantic models, the trainer's messages msgspec structs: nothing is ever unpickled. `Client` is
imported when it is asked for, so that server and trainer do without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secondnature.wire.bodies import (
    Body,
    CheckpointReply,
    CorrectionsReply,
    CorrectionState,
    DeleteReply,
    DevelopmentLook,
    EndToken,
    ErrorDetail,
    ErrorReply,
    FeedbackReply,
    FeedbackRequest,
    Health,
    ImportRequest,
    JobList,
    JobStatus,
    LessonDetail,
    LessonInfo,
    LessonList,
    MetadataRequest,
    NamedPack,
    Objective,
    PassedOver,
    PhaseProgress,
    PruneReply,
    PruneRequest,
    ReplayMatch,
    ReplaySettings,
    SdftSettings,
    TrainReply,
    TrainRequest,
    UnreadableLine,
    Wiring,
)
from secondnature.wire.completions import (
    ALWAYS_NEUTRAL,
    NEUTRAL,
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    StreamOptions,
)
from secondnature.wire.responses import ResponsesRequest
from secondnature.wire.trainer import (
    Asking,
    Attach,
    Cancel,
    DevelopmentProbe,
    Done,
    Failed,
    Hello,
    Judged,
    Layout,
    Progress,
    Ready,
    Shutdown,
    TokenExample,
    ToServer,
    ToTrainer,
    Train,
    TrainerPhase,
    decode_for_server,
    decode_for_trainer,
    encode,
)

if TYPE_CHECKING:
    from secondnature.wire.client import Client

__all__ = [
    "ALWAYS_NEUTRAL",
    "NEUTRAL",
    "Asking",
    "Attach",
    "Body",
    "Cancel",
    "ChatCompletionRequest",
    "ChatMessage",
    "CheckpointReply",
    "Client",
    "CompletionRequest",
    "CorrectionState",
    "CorrectionsReply",
    "DeleteReply",
    "DevelopmentLook",
    "DevelopmentProbe",
    "Done",
    "EndToken",
    "ErrorDetail",
    "ErrorReply",
    "Failed",
    "FeedbackReply",
    "FeedbackRequest",
    "Health",
    "Hello",
    "ImportRequest",
    "JobList",
    "JobStatus",
    "Judged",
    "Layout",
    "LessonDetail",
    "LessonInfo",
    "LessonList",
    "MetadataRequest",
    "NamedPack",
    "Objective",
    "PassedOver",
    "PhaseProgress",
    "Progress",
    "PruneReply",
    "PruneRequest",
    "Ready",
    "ReplayMatch",
    "ReplaySettings",
    "ResponsesRequest",
    "SdftSettings",
    "Shutdown",
    "StreamOptions",
    "ToServer",
    "ToTrainer",
    "TokenExample",
    "Train",
    "TrainReply",
    "TrainRequest",
    "TrainerPhase",
    "UnreadableLine",
    "Wiring",
    "decode_for_server",
    "decode_for_trainer",
    "encode",
]


def __getattr__(name: str) -> Any:
    """`Client`, at its first use. Raises AttributeError."""
    if name == "Client":
        from secondnature.wire.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
