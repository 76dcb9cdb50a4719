"""`secondnature doctor`: can this machine serve and learn, does a server do it, do answers flip? (process D)

Two of its questions are put to a running server of either engine. *Wiring*: does the engine compute with the memory
that lessons are written into? *Write and restore*: a lesson of one step on a few meaningless tokens has to change
their log-probabilities, and its undo has to bring back what was. The A/A floor asks each probe twice, many at once,
with the same weights: batching alone changes some greedy answers, and a gate has to see more than that.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from secondnature import config
from secondnature.cli import FAILED, INTERRUPTED
from secondnature.cli.connect import Where, open_server
from secondnature.cli.follow import Interrupted, Interrupts, follow
from secondnature.cli.learn import submit
from secondnature.cli.machine import Finding, environment
from secondnature.cli.output import Output
from secondnature.cli.progress import counting, waiting
from secondnature.errors import BadInput, ContextOverflow, SecondnatureError, TrainingError, Unreachable
from secondnature.records import OPEN_STATES, Example, Lesson, OptimizerSettings, Outcome, Probe, read_jsonl
from secondnature.wire import Client, EndToken, LessonInfo, LessonList, ReplaySettings, TrainRequest

AT_ONCE = 32
"""Probes in flight: what the gate does too."""
MAX_TOKENS = 160
"""Of an answer, as the gate asks; where the model reads fewer, the server's own limit."""
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
TAUGHT = [10 + 7 * i % 80 for i in range(48)]
"""Token ids of the lesson of `write and restore`: there in every vocabulary, and no text."""
NUM_CONTEXT = 32
TRIES: tuple[tuple[float | None, int], ...] = ((1e-7, 1), (None, 1), (None, 4))
"""Learning rate (None: the server's) and steps of that lesson; the next where one changed no log-probability. The
first is so small that whoever is answered meanwhile hardly notices."""


def doctor(probes: Path | None, where: Where, out: Output, *, write: bool) -> int:
    """Look at everything; the exit code: 1 if something must be mended. `write`: also teach and undo a lesson."""
    asked = read_jsonl(probes, Probe) if probes is not None else []
    settings = config.load({"home": where.home})
    with waiting(out, "looking at this machine"):
        findings = environment(settings.home.expanduser().absolute())
    num_seen = len(findings)
    try:
        with open_server(where, out, start="never") as server:
            health = server.health
            level = "ok" if health.status == "ok" else "warn"
            found = f"{health.model} at {server.client.url}, weights {health.weights_version}"
            found, hint = f"{found}, trainer {health.trainer}", ""
            if health.status != "ok":
                found, hint = f"{found}; {health.detail or health.status}", "see server.log in its home"
            findings.append(Finding("server", level, found, hint))
            findings.append(_key_works(server.client))
            if findings[-1].level != "fail":
                findings += _wiring(server.client)
                if write:
                    findings.append(_write_and_restore(server.client, out))
            if asked:
                findings.append(_flips(server.client, asked, out))
    except Unreachable as e:
        answered = len(findings) > num_seen
        level = "fail" if answered or where.url is not None or asked else "warn"
        findings.append(Finding("server", level, e.message, e.hint))
    except Interrupted:
        out.note("stopped; the lesson of the examination was undone")
        return INTERRUPTED
    table = Table("what", "", "found", "do", box=None)
    for f in findings:
        table.add_row(f.name, Text(f.level, style=COLOURS[f.level]), Text(f.found), Text(f.hint))
    out.say(table)
    out.result({"findings": [asdict(f) for f in findings]})
    return FAILED if any(f.level == "fail" for f in findings) else 0


def _key_works(client: Client) -> Finding:
    try:
        ledger = client.ledger()
    except SecondnatureError as e:
        return Finding("key", "fail", e.message, e.hint or "set SECONDNATURE_API_KEY")
    found = f"accepted; {len(ledger.corrections)} corrections in the ledger"
    if ledger.unreadable:
        lines = "; ".join(f"line {x.line}: {x.reason}" for x in ledger.unreadable[:3])
        found += f", {len(ledger.unreadable)} line{'s'[: len(ledger.unreadable) > 1]} that cannot be read ({lines})"
        return Finding("key", "warn", found, "upgrade the server, or mend ledger.jsonl in its home")
    if ledger.num_torn:
        found += "; its end was torn by a crash, and was never acknowledged"
    return Finding("key", "ok", found)


def _wiring(client: Client) -> list[Finding]:
    """What the engine computes with, and what ends its answers, as it says itself."""
    name = "wiring"
    try:
        found = client.wiring()
    except SecondnatureError as e:
        return [Finding(name, "fail", e.message, e.hint)]
    engine = (
        f"vLLM {found.engine_version}"
        if found.engine == "vllm"
        else f"local, transformers {found.engine_version}"
    )
    cache = {
        "none": "no prefix cache",
        "off": "prefix cache off",
        "salted": "prefix cache salted with the epoch",
        "unsalted": "prefix cache NOT salted with the epoch",
    }[found.cache]
    text = f"{engine}: {found.aliased} of {found.tensors} tensors are the arena's memory "
    text += f"({found.nbytes / 1e6:.1f} MB), {cache}"
    wrong = found.problems or found.cache == "unsalted" or found.aliased != found.tensors or not found.tensors
    if wrong:
        text = "; ".join([text, *found.problems])
        hint = "do not teach this server: restart it, and report what it says"
        return [Finding(name, "fail", text, hint), _ends(found.ends)]
    return [Finding(name, "ok", text), _ends(found.ends)]


def _ends(ends: list[EndToken]) -> Finding:
    """What ends a turn, and who says so."""
    name = "end of a turn"
    if not ends:
        hint = "set `eos_token_id` in generation_config.json to the token that does"
        return Finding(name, "warn", "nothing ends an answer but its length", hint)
    return Finding(name, "ok", "; ".join(f"{e.text!r} ({e.id}): {', '.join(e.named_by)}" for e in ends))


@dataclass(frozen=True)
class Reading:
    """The log-probabilities of `TAUGHT` at one moment, and which weights gave them."""

    logprobs: list[float]
    version: str
    trial: bool

    def distance(self, other: Reading) -> float:
        """The largest difference, nats; 0: equal to the bit."""
        return max(abs(a - b) for a, b in zip(self.logprobs, other.logprobs, strict=True))


def _read(client: Client) -> Reading:
    said = client.complete(TAUGHT, max_tokens=0, echo=True, logprobs=0, temperature=0)
    found = said["choices"][0]["logprobs"]["token_logprobs"][1 : len(TAUGHT)]
    return Reading([float(x) for x in found], str(said["weights_version"]), bool(said["trial"]))


def _write_and_restore(client: Client, out: Output) -> Finding:
    """Laws 2 and 8: through the routes, a write shows and its undo leaves nothing.

    Raises:
        Interrupted, Unreachable: ctrl-C; the server is gone.
    """
    name = "write and restore"
    log = client.lessons()
    holder = next((x for x in log.lessons if x.state in OPEN_STATES), None)
    if holder is not None:
        state = holder.state.replace("_", " ")
        return Finding(name, "warn", f"not now: {holder.id} is {state}", "ask again when it has ended")
    try:
        before, again = _read(client), _read(client)
        found = Finding(name, "fail", "nothing was tried")
        for lr, steps in TRIES:
            during, lesson = _on_trial(client, lr, steps, out)
            found = _compare(before, again, during, _read(client), lesson, log, client.lessons())
            if during.distance(before) > before.distance(again) or lesson.parent != before.version:
                break
    except Unreachable:
        raise
    except SecondnatureError as e:
        return Finding(name, "fail", f"{e.type}: {e.message}", e.hint)
    return found


def _on_trial(client: Client, lr: float | None, steps: int, out: Output) -> tuple[Reading, Lesson]:
    """Teach `TAUGHT`, read it, undo it. Raises TrainingError: the lesson failed."""
    example = Example(context_ids=TAUGHT[:NUM_CONTEXT], continuation_ids=TAUGHT[NUM_CONTEXT:])
    request = TrainRequest(
        examples=[example],
        max_steps=steps,
        batch_size=1,
        learned_loss=0.0,
        replay=ReplaySettings(share=0.0, lessons=False),
        optimizer=OptimizerSettings(lr=lr),
        lesson=LessonInfo(behaviour="doctor", note="doctor: write and restore"),
    )
    with Interrupts() as interrupts:
        reply = submit(client, request, out)
        assert reply.lesson is not None, "it is no dry run"
        status = follow(client, reply.job, out, interrupts, judged=False)
        if status.state != "on_trial":
            why = status.error.message if status.error else "no reason was given"
            raise TrainingError(f"{reply.lesson} is {status.state}: {why}", "see trainer.log in the home")
        try:
            during = _read(client)
        finally:
            client.revert(reply.lesson)
    return during, client.lesson(reply.lesson).lesson


def _compare(
    before: Reading,
    again: Reading,
    during: Reading,
    after: Reading,
    lesson: Lesson,
    log_before: LessonList,
    log_after: LessonList,
) -> Finding:
    name, hint = "write and restore", "restart the server, and report this"
    moved, left = during.distance(before), after.distance(before)
    noise = before.distance(again)
    if lesson.parent != before.version:
        found = f"not now: the weights became {lesson.parent} meanwhile; {lesson.id} was undone"
        return Finding(name, "warn", found, "ask again when nobody teaches")
    if moved <= noise:
        return Finding(
            name,
            "fail",
            f"{lesson.id}: {lesson.steps} steps changed no log-probability (by {moved:.2g} nats; two readings "
            f"without a lesson differ by {noise:.2g})",
            "the engine does not compute with what is written: do not teach it, and report this",
        )
    if not during.trial or during.version == before.version:
        found = f"an answer on trial was stamped {during.version}, trial {str(during.trial).lower()}"
        return Finding(name, "fail", found, hint)
    state = (after.version, after.trial, log_after.optimizer_version)
    if state != (before.version, False, log_before.optimizer_version):
        found = f"after the undo of {lesson.id} the weights are {after.version}; before it {before.version}"
        if after.version == before.version:
            found = (
                f"after the undo of {lesson.id} the trial, or the optimizer's state, is not that of before"
            )
        return Finding(name, "fail", found, hint)
    found = f"{lesson.steps} step{'s'[: lesson.steps > 1]}: {len(before.logprobs)} log-probabilities moved "
    found += f"by up to {moved:.2g} nats; undone: weights {after.version} again, log-probabilities "
    if left:
        text = f"{found}differ by up to {left:.2g} nats (two readings before it: by {noise:.2g})"
        return Finding(
            name, "warn", text, "answers in a busy batch differ a little: ask again when nobody asks"
        )
    return Finding(name, "ok", f"{found}the same to the bit (entry {lesson.id})")


def _flips(client: Client, probes: list[Probe], out: Output) -> Finding:
    """The A/A floor: the same weights, asked twice."""
    from secondnature.evidence import aa_floor

    spoken = [p for p in probes if p.check.prefers is None]
    if not spoken:
        raise BadInput(
            f"{len(probes)} probes, all with `prefers`: nothing is generated, so nothing can flip",
            "give probes with matches, not_matches or python",
        )
    out.note(f"asking {len(spoken)} probes twice, {AT_ONCE} at once")
    versions: set[str] = set()
    with counting(out, "asking probes", 2 * len(spoken), "answers") as tick:
        first, second = (_ask(client, spoken, versions, tick) for _ in range(2))
    floor = aa_floor(first, second)
    low, high = floor.interval
    found = f"{floor.flips} of {floor.n} verdicts flip by themselves "
    found += f"({floor.rate:.1%}; 95 %: {low:.1%} to {high:.1%})"
    if len(versions) != 1:
        return Finding(
            "A/A floor",
            "warn",
            f"{found}, but the weights changed meanwhile",
            "ask again when no lesson runs",
        )
    if floor.guard_probes is None:
        return Finding("A/A floor", "warn", found, "no number of guard probes would do with so many flips")
    return Finding("A/A floor", "ok", f"{found}: a guard needs {floor.guard_probes} probes")


def _ask(client: Client, probes: list[Probe], versions: set[str], tick: Callable[[], None]) -> list[Outcome]:
    """Every probe's greedy answer, judged; `versions` collects the weights that gave them."""
    from secondnature.evidence import judge_probes

    def ask(probe: Probe) -> str:
        turns = [{"role": m.role, "content": m.content} for m in probe.prompt]
        try:
            reply: dict[str, Any] = client.chat(turns, temperature=0, max_tokens=MAX_TOKENS)
        except ContextOverflow:
            reply = client.chat(turns, temperature=0)
        versions.add(str(reply.get("weights_version")))
        tick()
        return str(reply["choices"][0]["message"]["content"] or "")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(ask, probes))
    return judge_probes(probes, answers)
