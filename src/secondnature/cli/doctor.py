"""`secondnature doctor`: can this machine serve and learn, and how much do answers flip by themselves? (process D)

The environment is looked at without importing torch. The A/A floor asks each probe twice, through the same route as
everybody and many at once, with the same weights: batching alone changes some greedy answers, and a gate has to see
more than that.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from secondnature import config
from secondnature.cli import FAILED
from secondnature.cli.connect import Where, open_server
from secondnature.cli.output import Output
from secondnature.errors import BadInput, ContextOverflow, SandboxFailed, SecondnatureError, Unreachable
from secondnature.records import Outcome, Probe, read_jsonl
from secondnature.wire import Client

AT_ONCE = 32
"""Probes in flight: what the gate does too."""
MAX_TOKENS = 160
"""Of an answer, as the gate asks; where the model reads fewer, the server's own limit."""
MIN_FREE_BYTES = 5_000_000_000
NEEDED = {"torch": (2, 6), "transformers": (5, 7), "fastapi": (0, 115), "uvicorn": (0, 30)}
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    name: str
    level: Literal["ok", "warn", "fail"]
    found: str
    hint: str = ""


def doctor(probes: Path | None, where: Where, out: Output) -> int:
    """Look at everything; the exit code: 1 if something must be mended."""
    asked = read_jsonl(probes, Probe) if probes is not None else []
    settings = config.load({"home": where.home})
    findings = environment(settings.home.expanduser().absolute())
    try:
        with open_server(where, out, start="never") as server:
            health = server.health
            level = "ok" if health.status == "ok" else "warn"
            found = f"{health.model} at {server.client.url}, weights {health.weights_version}"
            findings.append(Finding("server", level, f"{found}, trainer {health.trainer}", health.detail))
            findings.append(_key_works(server.client))
            if asked:
                findings.append(_flips(server.client, asked, out))
    except Unreachable as e:
        level = "fail" if where.url is not None or asked else "warn"
        findings.append(Finding("server", level, e.message, e.hint))
    table = Table("what", "", "found", "do", box=None)
    for f in findings:
        table.add_row(f.name, Text(f.level, style=COLOURS[f.level]), Text(f.found), Text(f.hint))
    out.say(table)
    out.result({"findings": [asdict(f) for f in findings]})
    return FAILED if any(f.level == "fail" for f in findings) else 0


def environment(home: Path) -> list[Finding]:
    """What can be seen of this machine without a server."""
    version = platform.python_version()
    python = Finding("python", "ok" if sys.version_info >= (3, 11) else "fail", version)
    return [python, *map(_package, NEEDED), _cores(), _bf16(), _shared_memory(), _sandbox(), _disk(home)]


def _package(name: str) -> Finding:
    minimum = NEEDED[name]
    wanted = ".".join(map(str, minimum))
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "fail", f"missing; expected >= {wanted}", "pip install 'secondnature[engine]'")
    numbers = [int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit()]
    if tuple(numbers) < minimum:
        return Finding(name, "fail", f"{found}; expected >= {wanted}", "pip install 'secondnature[engine]'")
    return Finding(name, "ok", found)


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0))
    hint = "" if cores > 1 else "answers slow down while a lesson runs: engine and trainer share one core"
    return Finding("cores", "ok" if cores > 1 else "warn", str(cores), hint)


def _bf16() -> Finding:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return Finding("bf16", "warn", "unknown: no /proc/cpuinfo")
    native = sorted({"amx_bf16", "avx512_bf16", "bf16"} & set(flags))
    return Finding("bf16", "ok", ", ".join(native) or "no instructions: each weight is widened at use")


def _shared_memory() -> Finding:
    """The arena needs an anonymous file whose pages are really there."""
    size = 1 << 20
    try:
        file = os.memfd_create("secondnature-doctor")
    except (AttributeError, OSError) as e:
        return Finding(
            "memfd", "warn", f"{e}", "the weights will lie in a mapped file in a private directory"
        )
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as e:
        return Finding("memfd", "fail", f"{e.strerror}", "give this process more memory")
    finally:
        os.close(file)
    return Finding("memfd", "ok", "works")


def _sandbox() -> Finding:
    """Where generated code is judged."""
    from secondnature.evidence import walls

    try:
        standing = walls()
    except SandboxFailed as e:
        return Finding("sandbox", "fail", e.message, e.hint)
    as_root = "ROOT" in standing
    hint = "run the server as an ordinary user: code in probes runs with its rights" if as_root else ""
    return Finding("sandbox", "warn" if as_root else "ok", ", ".join(standing), hint)


def _disk(home: Path) -> Finding:
    there = next(p for p in (home, *home.parents) if p.exists())
    usage = shutil.disk_usage(there)
    found = f"{usage.free / 1e9:.1f} GB free at {home}"
    if not os.access(there, os.W_OK):
        return Finding("home", "fail", f"{there} cannot be written", "choose another --home")
    if usage.free < MIN_FREE_BYTES:
        return Finding("home", "warn", found, "a checkpoint needs room for two copies of the weights")
    return Finding("home", "ok", found)


def _key_works(client: Client) -> Finding:
    try:
        count = len(client.corrections())
    except SecondnatureError as e:
        return Finding("key", "fail", e.message, e.hint or "set SECONDNATURE_API_KEY")
    return Finding("key", "ok", f"accepted; {count} corrections in the ledger")


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
    floor = aa_floor(_ask(client, spoken, versions), _ask(client, spoken, versions))
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


def _ask(client: Client, probes: list[Probe], versions: set[str]) -> list[Outcome]:
    """Every probe's greedy answer, judged; `versions` collects the weights that gave them."""
    from secondnature.evidence import judge_probes

    def ask(probe: Probe) -> str:
        turns = [{"role": m.role, "content": m.content} for m in probe.prompt]
        try:
            reply: dict[str, Any] = client.chat(turns, temperature=0, max_tokens=MAX_TOKENS)
        except ContextOverflow:
            reply = client.chat(turns, temperature=0)
        versions.add(str(reply.get("weights_version")))
        return str(reply["choices"][0]["message"]["content"] or "")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(ask, probes))
    return judge_probes(probes, answers)
