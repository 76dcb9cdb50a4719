"""docs/experiments/size.md and its figure, from scale.json alone."""

from __future__ import annotations

from typing import Any

from figures import Line, Panel, draw

GB = 1e9
KINDS = {
    "delta.safetensors": "differences",
    "optimizer.safetensors": "optimizer states",
    "moved.json": "tables of movements",
    "corrections.jsonl": "corrections",
    "lesson.json": "entries",
    "model/": "working copy",
}
PHASES = (
    "start",
    "idle",
    "training",
    "writing down the change",
    "undo",
    "restart with a kept lesson",
    "working copy",
)


def render(results: dict[str, Any]) -> str:
    """The page."""
    parts = [
        "# A large model, many lessons",
        "Made by `python benchmarks/scale.py`, by hand; every figure is of one run, on the machine "
        "named below it. Ten to "
        "twenty other processes shared its two cores: memory and disk are what they are, seconds are upper bounds.",
    ]
    if "large" in results:
        parts += _large(results["large"])
    if "listed" in results:
        parts += _listed(results["listed"]["present"])
    if "kept" in results:
        parts += _kept(results["kept"]["present"])
    return "\n\n".join(parts) + "\n"


def _machine(found: dict[str, Any]) -> str:
    at = found["machine"]
    return (
        f"Measured on {found['date'][:10]}: {at['cpu']}, {at['cores']} cores, {at['memory_bytes'] / GB:.0f} GB, "
        f"torch {at['versions']['torch']}; one thread each, other work on the machine."
    )


def _large(runs: dict[str, Any]) -> list[str]:
    """Private memory over the idle trainer and server, as a share of the weights."""
    parts = [
        "## A large model",
        "Llama-like models of random bf16 weights; one lesson of two steps at rank 16 on two short corrections "
        "with rejected answers. Private memory (`RssAnon`, sampled every 50 ms, at its peak in the phase) of "
        "server and trainer; the weights, shared by both, are counted once and not in it. An interpreter with "
        "torch has 0.3 GB of its own in each. The sums of the intended updates are among the mapped "
        "files. In commit "
        "effa3c4 writing the change down belongs to the phase `training`.",
    ]
    for name, found in runs.items():
        weights = 2 * found["parameters"] / GB
        rows = [
            "| phase | seconds | server, GB | trainer, GB | trainer's mapped files, GB |",
            "|---|---|---|---|---|",
        ]
        for phase, seconds, peaks in _phases(found):
            cells = [
                f"{peaks[who][key] / GB:.2f}" if key in peaks.get(who, {}) else ""
                for who, key in (("server", "RssAnon"), ("trainer", "RssAnon"), ("trainer", "RssFile"))
            ]
            rows.append(f"| {phase} | {seconds:.0f} | {' | '.join(cells)} |")
        title = f"### {found['parameters'] / 1e6:,.0f}M parameters, {weights:.2f} GB of weights: {name}"
        undone = "to the byte" if found["undone_to_the_byte"] else "NOT to the byte"
        parts += [title, "\n".join(rows)]
        parts.append(
            f"{found['shape']}. Ready after {found['start_s']:.0f} s, after a restart with a kept lesson "
            f"{found['restart_s']:.0f} s; the undo gave the weights of before {undone}. {_machine(found)}"
        )
    return parts


def _phases(found: dict[str, Any]) -> list[tuple[str, float, dict[str, Any]]]:
    """(phase, seconds, peaks), the kept lesson's and those around it."""
    rows: list[tuple[str, float, dict[str, Any]]] = []
    for part in ("first", "second"):
        for phase, seconds in found[part]["seconds"].items():
            if phase.removeprefix("kept: ") in PHASES and seconds > 0.5:
                rows.append((phase.removeprefix("kept: "), seconds, found[part]["peaks"].get(phase, {})))
    return rows


def _listed(found: dict[str, Any]) -> list[str]:
    start, before, routes = found["start"], found["form_of_before"], found["routes"]
    rows = [
        "| what | first, s | then: median (range), s | CPU seconds of the server: first, then |",
        "|---|---|---|---|",
        f"| open the home | {start['first']['home']:.2f} | {start['home']['median']:.2f} (up to "
        f"{start['home']['high']:.2f}) | |",
        f"| open the log | {start['first']['log']:.2f} | {start['log']['median']:.2f} (up to "
        f"{start['log']['high']:.2f}) | |",
        f"| open the log, home in the form of before | {before['first']['log']:.2f} | "
        f"{before['log']['median']:.2f} (up to {before['log']['high']:.2f}) | |",
    ]
    names = {"lessons": "`GET /v1/lessons`", "status": "`GET /v1/train/status`", "dry_run": "a dry run"}
    for key, name in names.items():
        at = routes[key]
        rows.append(
            f"| {name} | {at['first']:.2f} | {at['median']:.2f} ({at['low']:.2f} to {at['high']:.2f}) | "
            f"{at['first_cpu']:.2f}, {at['cpu']:.2f} |"
        )
    return [
        f"## {found['entries']:,} lessons",
        "Half of them are kept and in the working copy, four corrections each; the first dry run after a start "
        "encodes all that was taught, for replay. A server with such a home that nobody asks anything uses "
        f"{found['idle_share_of_a_core']:.1%} of a core.",
        "\n".join(rows),
        _machine(found),
    ]


def _kept(found: dict[str, Any]) -> list[str]:
    rows = [
        "| kept | undo of the newest, s | read by a start: log, weights, s | chain | "
        + " | ".join(f"{name}, MB" for name in KINDS.values())
        + " |",
        "|" + "---|" * (4 + len(KINDS)),
    ]
    for row in found["rows"]:
        undo, reads = row["undo_s"], row["reads"]
        logs, weights = sorted(r["log_s"] for r in reads), sorted(r["weights_s"] for r in reads)
        middle = len(reads) // 2
        sizes = " | ".join(f"{row['disk'].get(kind, 0) / 1e6:.1f}" for kind in KINDS)
        rows.append(
            f"| {row['kept']} | {undo['median']:.2f} ({undo['low']:.2f} to {undo['high']:.2f}) | "
            f"{logs[middle]:.2f}, {weights[middle]:.2f} "
            f"({weights[0]:.2f} to {weights[-1]:.2f}) | {row['chain']} | {sizes} |"
        )
    return [
        "## Lessons kept in a row",
        f"One step each, on the embedded model ({found['model_bytes'] / 1e6:.0f} MB). Differences grow with their "
        "number; optimizer states are kept for the newest 8, and the chain is folded into the working copy when "
        "it is longer than 8.",
        "\n".join(rows),
        "![Undo, start and disk by the number of kept lessons](../figures/kept.svg)",
        _machine(found),
    ]


def figure(results: dict[str, Any]) -> str | None:
    """Undo, what a start reads, and disk, over the number of kept lessons."""
    if "kept" not in results:
        return None
    rows = results["kept"]["present"]["rows"]
    undo = [(r["kept"], r["undo_s"]["median"], r["undo_s"]["low"], r["undo_s"]["high"]) for r in rows]
    reads: list[tuple[float, float, float, float]] = []
    for row in rows:
        times = sorted(r["log_s"] + r["weights_s"] for r in row["reads"])
        reads.append((row["kept"], times[len(times) // 2], times[0], times[-1]))
    deltas = [_flat(r, r["disk"].get("delta.safetensors", 0)) for r in rows]
    rest = [_flat(r, sum(n for kind, n in r["disk"].items() if kind != "delta.safetensors")) for r in rows]
    x_label = "kept lessons"
    panels = [
        Panel("Time", x_label, "seconds", [Line(0, undo), Line(1, reads)]),
        Panel("Disk", x_label, "MB", [Line(2, deltas), Line(3, rest)]),
    ]
    legend = ["undo", "read by a start", "differences", "all else"]
    text = "; ".join(
        f"{u[0]} kept: undo {u[1]:.2f} s, start {s[1]:.2f} s" for u, s in zip(undo, reads, strict=True)
    )
    return draw(panels, legend, key="kept", title="Time and disk by the number of kept lessons", text=text)


def _flat(row: dict[str, Any], nbytes: int) -> tuple[float, float, float, float]:
    return (row["kept"], nbytes / 1e6, nbytes / 1e6, nbytes / 1e6)
