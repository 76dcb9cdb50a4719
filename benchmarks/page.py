"""docs/benchmarks.md from results.json: every figure of the page is one of the file (measures nothing)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Spread = dict[str, float]
Format = Callable[[float], str]


def _ms(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _mb(size: float) -> str:
    return f"{size / 1e6:.3g} MB" if size < 1e8 else f"{size / 1e6:.0f} MB"


def _times(value: float) -> str:
    return f"{value:.2f}×"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _percent(value: float) -> str:
    return f"{value:.1%}" if abs(value) >= 0.01 else f"{value:.2%}"


def _both(found: Spread, form: Format) -> str:
    """The median, and the smallest and the largest value behind it."""
    return f"{form(found['median'])} ({form(found['low'])} to {form(found['high'])})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _where(entry: dict[str, Any]) -> str:
    date = entry["date"].replace("T", " ").replace("+00:00", " UTC")
    return (
        f"*{date}, commit {entry['commit']}, model `{entry['model']}`, {entry['seconds']:.0f} s; other "
        f"programs meanwhile used {_percent(entry['others_cpu'])} of the machine's CPU time*"
    )


# ------------------------------------------------------------------------------------------ the sections


def _serving(found: dict[str, Any]) -> list[str]:
    rows: list[list[str]] = []
    kinds: list[tuple[str, str, Format]] = [
        ("time per token, p50", "p50", _ms),
        ("time per token, p99", "p99", _ms),
        ("time per token, p99.9", "p999", _ms),
        ("longest gap in a stream", "longest", _ms),
        ("longest time in which no stream got a token", "longest_silence", _ms),
        ("first token, p50", "first_token_p50", _ms),
        ("tokens per second, all streams", "tokens_per_s", _number),
    ]
    phases = found["phases"]
    for name, key, form in kinds:
        cells = [_both(phases[kind][key], form) for kind in ("serving", "learning")]
        rows.append([name, *cells, _both(phases["ratio"][key], _times)])
    trainer, cancel, revert = found["trainer"], found["cancel"], found["revert"]
    return [
        f"{found['clients']} clients stream chat completions of up to {found['max_tokens']} tokens, one "
        "after another. "
        f"{found['turns']} turns of {found['seconds_per_phase']:.0f} s each: without a lesson, during one, "
        "and the "
        "lesson without clients. Server, trainer and clients share the cores.",
        "",
        *_table(["", "without a lesson", "during a lesson", "ratio"], rows),
        "",
        f"- **{found['failed']} of {found['requests']:,} requests failed**; {found['stamped']:,} were "
        "stamped with the "
        f"weights that answered ({found['versions']:,} versions), {found['on_trial']:,} said `trial: true`, "
        f"{found['changed']:,} saw the weights change meanwhile. {found['tokens']:,} tokens.",
        f"- A cancel under load, with its undo, took {_both(cancel['seconds'], _ms)}; the longest gap of a "
        "stream "
        f"meanwhile was {_ms(cancel['longest_gap'])}. A kept lesson was reverted in "
        f"{_ms(revert['seconds']['median'])}; longest gap {_ms(revert['longest_gap'])}.",
        f"- The trainer made {_both(trainer['steps_per_s']['learning'], _number)} steps a second under load "
        "and "
        f"{_both(trainer['steps_per_s']['trainer alone'], _number)} alone: "
        f"{_both(trainer['ratio'], _times)}; {_number(trainer['tokens_per_s']['learning']['median'])} and "
        f"{_number(trainer['tokens_per_s']['trainer alone']['median'])} answer tokens a second.",
    ]


def _engine(found: dict[str, Any]) -> list[str]:
    peers = ("generate_fp32", "generate_cast_at_use", "generate_bf16")
    rows: list[list[str]] = []
    for row in found["rows"]:
        speed = _both(row["tokens_per_s"]["engine"], _number)
        cells = [_both(row["ratio"][peer], _times) for peer in peers]
        same = _percent(row["same_tokens_as_fp32"] / row["tokens"])
        rows.append([str(row["streams"]), speed, *cells, same])
    return [
        f"Tokens per second of the engine, {found['tokens_per_answer']} greedy tokens per stream, and how "
        "many times as "
        "fast it is as transformers' `generate` on the same requests: with the weights in fp32, on the "
        "engine's own "
        "bf16 weights cast where they are used, and in plain bf16.",
        "",
        *_table(["streams", "tokens/s", "vs fp32", "vs cast at use", "vs bf16", "same tokens as fp32"], rows),
    ]


def _step(found: dict[str, Any]) -> list[str]:
    rows: list[list[str]] = []
    for row in found["rows"]:
        cells = [_both(row["time_ratio"][k], _times) for k in ("whole", "whole_batched")]
        memory = [_times(row["memory_ratio"][k]) for k in ("whole", "whole_batched")]
        rows.append(
            [
                f"{row['context']} + {row['answer']}",
                _ms(row["seconds"]["frozen"]["median"]),
                *cells,
                _mb(row["peak_bytes"]["frozen"]),
                *memory,
                f"{row['gradient_cosine']:.3f}",
            ]
        )
    return [
        f"A step on {found['batch']} examples with the context frozen, relative to the same step over whole "
        "sequences "
        "(labels of the context -100, same model, same optimizer), its examples one by one or in one "
        "batch. Less than "
        "1× is better. Cosine: between the gradient with a frozen context and the full one, which it "
        "truncates.",
        "",
        *_table(
            [
                *("context + answer tokens", "frozen", "time vs one by one", "vs batched"),
                *("peak memory", "vs one by one", "vs batched", "cosine"),
            ],
            rows,
        ),
    ]


def _rounding(found: dict[str, Any]) -> list[str]:
    rows: list[list[str]] = []
    for row in found["rows"]:
        cells: list[str] = []
        for way in ("stochastic", "nearest"):
            for when in ("first", "all"):
                one = row[f"{way}_{when}"]
                cells.append(f"{_percent(one['kept'])} (cosine {one['cosine']:.2f})")
        rows.append([f"{row['lr']:g}", *cells])
    costs = found["costs"]
    names = {
        "apollo": f"APOLLO, rank {costs['rank']}, bf16, stochastic",
        "adamw_fused_fp32": "AdamW fused, fp32",
        "adamw_foreach_fp32": "AdamW foreach, fp32",
        "adamw_fused_bf16": "AdamW fused, bf16, nearest",
    }
    second: list[list[str]] = []
    for key, name in names.items():
        times = "" if key == "apollo" else _both(costs["time_ratio"][key], _times)
        copy = costs["fp32_copy_bytes"][key]
        second.append(
            [
                name,
                _ms(costs["seconds"][key]["median"]),
                times,
                _mb(costs["state_bytes"][key]),
                _mb(copy) if copy else "none",
            ]
        )
    return [
        "Share of the intended update that bf16 weights hold afterwards (its projection on the intended "
        "one), after the "
        f"first step and after {found['steps']}, for the same updates. The cosine is low where rounding "
        "noise is large.",
        "",
        *_table(
            [
                "learning rate",
                *("stochastic, 1 step", f"stochastic, {found['steps']} steps"),
                *("nearest, 1 step", f"nearest, {found['steps']} steps"),
            ],
            rows,
        ),
        "",
        f"One optimizer step at the shapes of this model ({_mb(costs['model_bytes'])} of bf16 weights), the "
        "writing "
        "included; the ratio is APOLLO's time over the peer's.",
        "",
        *_table(["", "time", "APOLLO takes", "state", "copy of the weights in fp32"], second),
    ]


def _undo(found: dict[str, Any]) -> list[str]:
    rows: list[list[str]] = []
    for row in found["rows"]:
        seconds = row["seconds"]
        rows.append(
            [
                f"{row['lr']:g}",
                str(row["steps"]),
                _percent(row["changed_elements"]),
                f"{_percent(row['share_of_model'])} ({_mb(row['bytes'])})",
                _both(seconds["revert"], _ms),
                _both(row["revert_over_reload"], _times),
                _ms(seconds["apply"]["median"]),
                _ms(seconds["content_id"]["median"]),
            ]
        )
    return [
        f"A lesson's difference on disk, relative to the model's {_mb(found['model_bytes'])}; the server's "
        "revert (rebuild "
        "from disk, check, write, check), also relative to reading the whole checkpoint and checking it; "
        "applying the "
        "difference alone, checked; computing the content id. Every undo gave the bytes of before.",
        "",
        *_table(
            [
                *("learning rate", "steps", "elements changed", "difference"),
                *("revert", "vs reading the checkpoint", "apply", "content id"),
            ],
            rows,
        ),
    ]


def _memory(found: dict[str, Any]) -> list[str]:
    rows: list[list[str]] = []
    for row in found["rows"]:
        owner, trainer = row["shared"]["arena"]
        rows.append(
            [
                _mb(row["weight_bytes"]),
                f"{_mb(owner['rss'])} + {_mb(trainer['rss'])}",
                f"{_mb(owner['pss'])} + {_mb(trainer['pss'])}",
                _mb(row["shared"]["own"]),
                _mb(row["private"]["own"]),
            ]
        )
    lines = [
        "Server and trainer at rest, against two processes with a model of their own, for this model and for a "
        "wider one with random weights. PSS counts a page that two processes share half in each; mapped files "
        "(libraries) are left out.",
        "",
        *_table(
            [
                *("weights", "arena resident: server + trainer", "arena PSS: server + trainer"),
                *("both processes, no files", "two private copies, no files"),
            ],
            rows,
        ),
    ]
    if copies := found.get("copies"):
        lines += [
            "",
            "From the smaller model to the larger, memory grows by "
            f"**{copies['shared']:.2f} bytes per byte of weights** here, by {copies['private']:.2f} with private "
            "copies; both hold the working memory of the same self-test, which grows with the model too.",
        ]
    return lines


SECTIONS: list[tuple[str, str, Callable[[dict[str, Any]], list[str]]]] = [
    ("serving", "Serving while it learns", _serving),
    ("engine", "Generation", _engine),
    ("step", "One training step", _step),
    ("rounding", "Rounding, and the optimizer", _rounding),
    ("undo", "Undo", _undo),
    ("memory", "Copies of the weights", _memory),
]


def _machines(results: dict[str, Any]) -> list[str]:
    """The machine, once per different one."""
    lines: list[str] = []
    for entry in results.values():
        machine = entry["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        line = (
            f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['flags'])}), "
            f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}, Python {machine['python']}, "
            f"{versions}. "
            f"torch runs 1 thread in every process."
        )
        if line not in lines:
            lines.append(line)
    return lines


def render(results: dict[str, Any]) -> str:
    """The page. `results` as `run.py` writes it."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench` from `benchmarks/results.json`; no figure is entered by hand. Figures are "
        "medians, with the smallest and the largest value of the turns behind them. A ratio compares with a peer "
        "in the same run, turn by turn; so it says more than the milliseconds, which are this machine's.",
        "",
        *_machines(results),
    ]
    for name, title, section in SECTIONS:
        if name in results:
            entry = results[name]
            lines += ["", f"## {title}", "", *section(entry["measured"]), "", _where(entry)]
    return "\n".join(lines) + "\n"
