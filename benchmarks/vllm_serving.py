"""vLLM with the plug-in under eight streaming clients: alone, while it is trained, and while a lesson is judged.

In every turn a server of its own for each `share` (of the time that the trainer works while requests are
answered). Its phases: the clients alone; a lesson that trains until it is cancelled; then examples/listening as
`secondnature learn` sends it, 1,140 probes before and after, which vLLM answers beside the clients. The lesson
is taken back, and the clients go on until enough requests were made. Server, trainer and clients share this
machine's cores.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from common import Settings, corrections, say, spread
from vllm_clients import Phase, Streams, compared, figures, streams, timeline
from vllm_process import Vllm, vllm

from secondnature.cli.sources import LearnFlags, read_sources
from secondnature.records import OptimizerSettings
from secondnature.wire import JobStatus, TrainRequest

LESSON = Path(__file__).parents[1] / "examples" / "listening"
NUM_CLIENTS = 8
MAX_TOKENS = 64
SHARES = (1.0, 0.5)
BIN_S = 1.0
ENOUGH = 520
"""Requests, at least, of each server."""
JUDGED = ("measuring before", "measuring after")


def lesson(**options: Any) -> TrainRequest:
    """Six corrections in small steps, as the benchmark of the local engine gives."""
    return TrainRequest(corrections=corrections(), optimizer=OptimizerSettings(lr=1e-5), **options)


def judged_lesson(*, quick: bool) -> TrainRequest:
    """examples/listening as `learn` reads it; `quick`: with a tenth of the probes."""
    request = read_sources(LESSON / "corrections.jsonl", LearnFlags()).request(LearnFlags())
    return request.model_copy(update={"probes": request.probes[::10], "max_steps": 3}) if quick else request


def await_step(server: Vllm, job: str, step: int) -> JobStatus:
    """Wait until a job has made so many steps."""
    while (status := server.client.status(job)).step < step:
        if status.state not in ("queued", "running"):
            raise RuntimeError(f"the lesson is {status.state}: {status.error}")
        time.sleep(0.05)
    return status


def training(server: Vllm, seconds: float) -> tuple[Phase, float]:
    """A lesson that trains for a while and is cancelled: the stretch, and the steps a second in it."""
    job = server.client.train(lesson(max_steps=100_000)).job
    first, begun = await_step(server, job, 2), time.monotonic()
    time.sleep(seconds)
    last, ended = await_step(server, job, first.step + 1), time.monotonic()
    if server.client.cancel(job).state != "cancelled":
        raise RuntimeError("the lesson could not be cancelled")
    return Phase("training", begun, ended), (last.step - first.step) / (ended - begun)


def judged(server: Vllm, *, quick: bool) -> tuple[list[Phase], JobStatus]:
    """A lesson with its evidence, taken back where it was kept: the phases it went through, and its end."""
    job = server.client.train(judged_lesson(quick=quick)).job
    phases: list[Phase] = []
    phase, begun = "waiting", time.monotonic()
    while True:
        status, now = server.client.status(job), time.monotonic()
        if status.phase != phase:
            phases.append(Phase(phase, begun, now))
            phase, begun = status.phase, now
        if status.state not in ("queued", "running", "on_trial"):
            break
        time.sleep(0.1)
    if status.evidence is None:
        raise RuntimeError(f"the lesson is {status.state}: {status.error}")
    if status.state == "kept":
        server.client.revert(status.lesson)
    return phases, status


def alone(seconds: float) -> Phase:
    """No lesson."""
    begun = time.monotonic()
    time.sleep(seconds)
    return Phase("serving", begun, time.monotonic())


def _turn(server: Vllm, clients: Streams, seconds: float, *, quick: bool) -> dict[str, Any]:
    """All phases once."""
    time.sleep(1 if quick else 5)  # warm
    start = time.monotonic()
    serving = [alone(seconds)]
    learning, steps_per_s = training(server, seconds)
    time.sleep(1.0)
    serving.append(alone(seconds / 2))
    phases, status = judged(server, quick=quick)
    end = phases[-1].ended
    time.sleep(1.0)
    serving.append(alone(seconds / 2))
    wanted = 20 if quick else ENOUGH
    while len(clients.answers) < wanted:
        time.sleep(0.1)
    clients.rest()
    judging = [p for p in phases if p.name in JUDGED]
    taught = [p for p in phases if p.name == "training"]
    assert status.evidence is not None
    return {
        "figures": {
            "serving": figures(serving, clients.answers),
            "training": figures([learning], clients.answers),
            "judging": figures(judging, clients.answers),
        },
        "steps_per_s": steps_per_s,
        "lesson": {
            "verdict": status.evidence.verdict,
            "said": status.evidence.sentence,
            "probes": len(judged_lesson(quick=quick).probes),
            "steps": status.step,
            "training_s": sum(p.ended - p.begun for p in taught),
            "judging_s": sum(p.ended - p.begun for p in judging),
        },
        "spans": [
            [name, p.begun - start, p.ended - start]
            for name, group in (("training", [learning, *taught]), ("judging", judging))
            for p in group
        ],
        "timeline": timeline(clients.answers, start, end + 10, BIN_S),
    }


def measure(settings: Settings) -> dict[str, Any]:
    """Time per token with and without a lesson, at two shares; failures, stamps, numbers that are not finite."""
    rows: dict[float, list[dict[str, Any]]] = {share: [] for share in SHARES}
    answers: list[Any] = []
    for turn in range(1 if settings.quick else 2):
        for share in SHARES[: 1 if settings.quick else None]:
            with vllm(settings.model, share=str(share)) as server:
                server.await_trainer()
                with streams(server, NUM_CLIENTS, max_tokens=MAX_TOKENS) as clients:
                    seconds = 3.0 if settings.quick else 20.0
                    rows[share].append(_turn(server, clients, seconds, quick=settings.quick))
                answers += clients.answers
                if server.client.health().status != "ok":
                    raise RuntimeError(f"the server is {server.client.health()}")
            found = rows[share][-1]
            say(
                f"turn {turn + 1}, share {share}: {found['lesson']['verdict']}, {len(answers):,} answers so far"
            )
    good = [a for a in answers if not a.failure]
    stamps = [a.stamp for a in good if a.stamp]
    shares = {str(s): _summary(s, turns) for s, turns in rows.items() if turns}
    return {
        "clients": NUM_CLIENTS,
        "max_tokens": MAX_TOKENS,
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "failures": sorted({a.failure for a in answers if a.failure})[:5],
        "not_finite": sum(a.not_finite for a in good),
        "stamped": len(stamps),
        "on_trial": sum(bool(s["trial"]) for s in stamps),
        "changed": sum(bool(s["weights_span"]["changed"]) for s in stamps),
        "versions": len({s["weights_version"] for s in stamps}),
        "tokens": sum(len(a.times) for a in good),
        "shares": shares,
        "bin_s": BIN_S,
    }


def _summary(share: float, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """One share, over its turns."""
    lessons = [t["lesson"] for t in turns]
    return {
        "share": share,
        "turns": len(turns),
        "phases": compared([t["figures"] for t in turns], "serving"),
        "steps_per_s": spread([t["steps_per_s"] for t in turns]),
        "lessons": lessons,
        "kept": sum(x["verdict"] == "kept" for x in lessons),
        "training_s": spread([x["training_s"] for x in lessons]),
        "judging_s": spread([x["judging_s"] for x in lessons]),
        "timeline": turns[0]["timeline"],
        "spans": turns[0]["spans"],
    }
