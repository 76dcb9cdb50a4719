"""What lies on disk and crosses the wire: corrections, probes, examples, lessons, evidence (any process).

One pydantic model each, `extra="forbid"`: an unknown field is an error that names it, never silently lost.
Files carry `schema_version`; a reader migrates older ones upwards and refuses newer ones. One noun a file; all are
found here.
"""

from secondnature.records.base import (
    SCHEMA_VERSION,
    Name,
    Record,
    Text,
    Unicode,
    digest,
    utc_now,
)
from secondnature.records.conversation import (
    Conversation,
    Message,
    Prompt,
    Role,
    SampleAnswer,
)
from secondnature.records.corrections import CUT_SHORT, Correction, Provenance
from secondnature.records.evidence import (
    EVIDENCE_VERSION,
    Comparison,
    Decision,
    Evidence,
    Flip,
    GateSettings,
    Verdict,
)
from secondnature.records.jsonl import (
    MAX_FILE_BYTES,
    MAX_LINE_BYTES,
    describe,
    describe_errors,
    parse_json,
    parse_jsonl,
    read_jsonl,
    to_jsonl,
)
from secondnature.records.lessons import (
    OPEN_STATES,
    STOPPED_BY,
    Cause,
    ErrorInfo,
    Example,
    KlMetric,
    KlSet,
    Lesson,
    LessonState,
    LookMetric,
    Moved,
    OptimizerSettings,
    StepMetric,
    TokenIds,
)
from secondnature.records.probes import (
    Check,
    Outcome,
    Probe,
    Side,
)

__all__ = [
    "CUT_SHORT",
    "EVIDENCE_VERSION",
    "MAX_FILE_BYTES",
    "MAX_LINE_BYTES",
    "OPEN_STATES",
    "SCHEMA_VERSION",
    "STOPPED_BY",
    "Cause",
    "Check",
    "Comparison",
    "Conversation",
    "Correction",
    "Decision",
    "ErrorInfo",
    "Evidence",
    "Example",
    "Flip",
    "GateSettings",
    "KlMetric",
    "KlSet",
    "Lesson",
    "LessonState",
    "LookMetric",
    "Message",
    "Moved",
    "Name",
    "OptimizerSettings",
    "Outcome",
    "Probe",
    "Prompt",
    "Provenance",
    "Record",
    "Role",
    "SampleAnswer",
    "Side",
    "StepMetric",
    "Text",
    "TokenIds",
    "Unicode",
    "Verdict",
    "describe",
    "describe_errors",
    "digest",
    "parse_json",
    "parse_jsonl",
    "read_jsonl",
    "to_jsonl",
    "utc_now",
]
