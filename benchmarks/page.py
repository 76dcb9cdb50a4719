"""docs/benchmarks.md from results.json: every figure of the page is one of the file (measures nothing)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import vllm_page
from figures import Line, Panel, draw
from forms import Format, both, mb, ms, number, percent, table, times


def _where(entry: dict[str, Any]) -> str:
    date = entry["date"].replace("T", " ").replace("+00:00", " UTC")
    return (
        f"*{date}, commit {entry['commit']}, model `{entry['model']}`, {entry['seconds']:.0f} s; other "
        f"programs meanwhile used {percent(entry['others_cpu'])} of the machine's CPU time*"
    )


# ------------------------------------------------------------------------------------------ the sections


def _serving(found: dict[str, Any]) -> list[str]:
    rows: list[list[str]] = []
    kinds: list[tuple[str, str, Format]] = [
        ("time per token, p50", "p50", ms),
        ("time per token, p99", "p99", ms),
        ("time per token, p99.9", "p999", ms),
        ("longest gap in a stream", "longest", ms),
        ("longest time in which no stream got a token", "longest_silence", ms),
        ("first token, p50", "first_token_p50", ms),
        ("tokens per second, all streams", "tokens_per_s", number),
    ]
    phases = found["phases"]
    for name, key, form in kinds:
        cells = [both(phases[kind][key], form) for kind in ("serving", "learning")]
        rows.append([name, *cells, both(phases["ratio"][key], times)])
    trainer, cancel, revert = found["trainer"], found["cancel"], found["revert"]
    return [
        f"{found['clients']} clients stream chat completions of up to {found['max_tokens']} tokens, one "
        "after another. "
        f"{found['turns']} turns of {found['seconds_per_phase']:.0f} s each: without a lesson, during one, "
        "and the "
        "lesson without clients. Server, trainer and clients share the cores.",
        "",
        *table(["", "without a lesson", "during a lesson", "ratio"], rows),
        "",
        f"- **{found['failed']} of {found['requests']:,} requests failed**; {found['stamped']:,} were "
        "stamped with the "
        f"weights that answered ({found['versions']:,} versions), {found['on_trial']:,} said `trial: true`, "
        f"{found['changed']:,} saw the weights change meanwhile. {found['tokens']:,} tokens.",
        f"- A cancel under load, with its undo, took {both(cancel['seconds'], ms)}; the longest gap of a "
        "stream "
        f"meanwhile was {ms(cancel['longest_gap'])}. A kept lesson was reverted in "
        f"{ms(revert['seconds']['median'])}; longest gap {ms(revert['longest_gap'])}.",
        f"- The trainer made {both(trainer['steps_per_s']['learning'], number)} steps a second under load "
        "and "
        f"{both(trainer['steps_per_s']['trainer alone'], number)} alone: "
        f"{both(trainer['ratio'], times)}; {number(trainer['tokens_per_s']['learning']['median'])} and "
        f"{number(trainer['tokens_per_s']['trainer alone']['median'])} answer tokens a second.",
    ]


def _engine(found: dict[str, Any]) -> list[str]:
    peers = ("generate_fp32", "generate_cast_at_use", "generate_bf16")
    rows: list[list[str]] = []
    for row in found["rows"]:
        speed = both(row["tokens_per_s"]["engine"], number)
        cells = [both(row["ratio"][peer], times) for peer in peers]
        same = percent(row["same_tokens_as_fp32"] / row["tokens"])
        rows.append([str(row["streams"]), speed, *cells, same])
    return [
        f"Tokens per second of the engine, {found['tokens_per_answer']} greedy tokens per stream, and how "
        "many times as "
        "fast it is as transformers' `generate` on the same requests: with the weights in fp32, on the "
        "engine's own "
        "bf16 weights cast where they are used, and in plain bf16.",
        "",
        *table(["streams", "tokens/s", "vs fp32", "vs cast at use", "vs bf16", "same tokens as fp32"], rows),
    ]


def _real(found: dict[str, Any]) -> list[str]:
    names = {
        "engine_fp32": "engine, fp32",
        "engine_bf16": "engine, bf16",
        "generate_fp32": "generate, fp32",
        "generate_bf16": "generate, bf16",
        "llama_cpp_bf16": "llama.cpp, bf16",
        "llama_cpp_q4": "llama.cpp, 4 bits",
        "vllm_bf16": "vLLM, bf16",
    }
    engine = found["engine"]
    measured = engine[0]["tokens_per_s"]
    rows = [
        [
            title,
            *(both(row["tokens_per_s"][name], number) for row in engine),
            *(
                both(row["of_the_better"][name], times) if name in row["of_the_better"] else ""
                for row in engine
            ),
        ]
        for name, title in names.items()
        if name in measured
    ]
    rest, lesson = found["at_rest_bytes"], found["lesson"]
    streams = [str(row["streams"]) for row in engine]
    others = {"llama_cpp_q4": "llama.cpp", "vllm_bf16": "vLLM"}
    missing = ", ".join(title for name, title in others.items() if name not in measured)
    probes = found.get("probes")
    return [
        "Tokens per second by streams, greedy: the engine in fp32 (the default on CPUs) and with `compute_dtype` "
        "bfloat16, transformers' `generate` in both, llama.cpp on the file of 4 bits that the weights came from "
        "and on the same weights in bf16, turn by turn; vLLM's CPU build after them, in its own process. Then "
        "the engine over the better of the two `generate`."
        + (f" Not measured here: {missing}." if missing else ""),
        "",
        *table(["", *streams, *(f"vs generate, {s}" for s in streams)], rows),
        "",
        *(
            [
                f"The {probes['probes']} probes of the pack `facts` were answered and judged in "
                f"{number(probes['fp32_seconds'])} s in fp32 and {number(probes['bf16_seconds'])} s in bfloat16 "
                f"({probes['fp32_tokens'][0]:,} tokens of prompts, {probes['fp32_tokens'][1]:,} of answers, fp32).",
                "",
            ]
            if probes
            else []
        ),
        *_real_steps(found),
        "",
        f"A server at rest holds {mb(rest['server'])}, its trainer {mb(rest['trainer'])}. A lesson of "
        f"{lesson['steps']} steps with {lesson['replayed']} replayed prompts and {lesson['probes']} probes, each "
        f"asked before and after it, took {lesson['seconds']:.0f} s, {lesson['training_seconds']:.0f} s of them "
        f"training; at the peaks the server held {mb(lesson['peak_bytes']['server'])} and the trainer "
        f"{mb(lesson['peak_bytes']['trainer'])}.",
    ]


def _real_steps(found: dict[str, Any]) -> list[str]:
    """Our steps, and those of transformers on the same answers."""
    names = {
        "alone": ("secondnature, all weights", found["step"]),
        "with_replay": ("secondnature, with 8 replayed answers", found["step"]),
        "adamw": ("transformers, fp32, AdamW, all weights", found["peers"]),
        "lora": ("transformers, fp32, peft's LoRA, rank 8", found["peers"]),
    }
    rows = [
        [
            title,
            both(among[name]["seconds"], ms),
            both(among[name]["processor_seconds"], ms),
            mb(among[name]["peak_bytes"]),
        ]
        for name, (title, among) in names.items()
        if name in among
    ]
    return [
        "A step on 8 short answers with their rejected ones (ORPO), each in a process of its own: the time that "
        "passed, the processor's time, and the peak of memory of the process's own (shared weights and mapped "
        f"files not counted; ours held {mb(found['step']['start_bytes'])} before the first).",
        "",
        *table(["step", "time", "processor", "memory"], rows),
    ]


def _step(found: dict[str, Any]) -> list[str]:
    rows: list[list[str]] = []
    for row in found["rows"]:
        cells = [both(row["time_ratio"][k], times) for k in ("whole", "whole_batched")]
        memory = [times(row["memory_ratio"][k]) for k in ("whole", "whole_batched")]
        rows.append(
            [
                f"{row['context']} + {row['answer']}",
                ms(row["seconds"]["frozen"]["median"]),
                *cells,
                mb(row["peak_bytes"]["frozen"]),
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
        *table(
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
                cells.append(f"{percent(one['kept'])} (cosine {one['cosine']:.2f})")
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
        slower = "" if key == "apollo" else both(costs["time_ratio"][key], times)
        copy = costs["fp32_copy_bytes"][key]
        second.append(
            [
                name,
                ms(costs["seconds"][key]["median"]),
                slower,
                mb(costs["state_bytes"][key]),
                mb(copy) if copy else "none",
            ]
        )
    return [
        "Share of the intended update that bf16 weights hold afterwards (its projection on the intended "
        "one), after the "
        f"first step and after {found['steps']}, for the same updates. The cosine is low where rounding "
        "noise is large.",
        "",
        *table(
            [
                "learning rate",
                *("stochastic, 1 step", f"stochastic, {found['steps']} steps"),
                *("nearest, 1 step", f"nearest, {found['steps']} steps"),
            ],
            rows,
        ),
        "",
        f"One optimizer step at the shapes of this model ({mb(costs['model_bytes'])} of bf16 weights), the "
        "writing "
        "included; the ratio is APOLLO's time over the peer's.",
        "",
        *table(["", "time", "APOLLO takes", "state", "copy of the weights in fp32"], second),
    ]


def _undo(found: dict[str, Any]) -> list[str]:
    rows: list[list[str]] = []
    for row in found["rows"]:
        seconds = row["seconds"]
        rows.append(
            [
                f"{row['lr']:g}",
                str(row["steps"]),
                percent(row["changed_elements"]),
                f"{percent(row['share_of_model'])} ({mb(row['bytes'])})",
                both(seconds["revert"], ms),
                both(row["revert_over_reload"], times),
                ms(seconds["apply"]["median"]),
                ms(seconds["content_id"]["median"]),
            ]
        )
    return [
        f"A lesson's difference on disk, relative to the model's {mb(found['model_bytes'])}; the server's "
        "revert (rebuild "
        "from disk, check, write, check), also relative to reading the whole checkpoint and checking it; "
        "applying the "
        "difference alone, checked; computing the content id. Every undo gave the bytes of before.",
        "",
        *table(
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
                mb(row["weight_bytes"]),
                f"{mb(owner['rss'])} + {mb(trainer['rss'])}",
                f"{mb(owner['pss'])} + {mb(trainer['pss'])}",
                mb(row["shared"]["own"]),
                mb(row["private"]["own"]),
            ]
        )
    lines = [
        "Server and trainer at rest, against two processes with a model of their own, for this model and for a "
        "wider one with random weights. PSS counts a page that two processes share half in each; mapped files "
        "(libraries) are left out.",
        "",
        *table(
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


PEERS = {
    "trl_adamw": "TRL, fp32, AdamW",
    "trl_apollo": "TRL, fp32, APOLLO",
    "trl_default_adamw": "TRL, its defaults, AdamW",
    "plain_adamw": "plain loop, AdamW",
}
"""What whole steps are compared with."""
HOLDERS = {
    "trl": "TRL, fp32",
    "trl_default": "TRL, its defaults",
    "plain": "plain loop",
    "ours_bf16": "ours, bf16 weights",
    "ours_recomputed": "ours, recomputing (of TRL's defaults)",
}


def _optional(found: dict[str, Any], key: str, form: Callable[[Any], str]) -> str:
    return form(found[key]) if key in found else ""


def _training(found: dict[str, Any]) -> list[str]:
    rows, parts, memory = found["rows"], [], []
    speeds: list[list[str]] = []
    for row in rows:
        point = f"{row['context']} + {row['answer']}, {row['answers']}"
        seconds = row["seconds"]
        over = [_optional(row["over_ours"], k, lambda v: both(v, times)) for k in PEERS]
        share = both(row["share_of_limit"], percent)
        cheapest = percent(row["share_with_adamw"]["median"])
        speeds.append([point, ms(seconds["ours"]["step"]["median"]), share, cheapest, *over])
        spreads = seconds["parts"]
        again = ms(row["seconds"]["ours_recomputed"]["step"]["median"])
        keys = ("prefill", "pass", "update", "stock_prefill", "stock_pass", "stock_update", "adamw_update")
        cells = [ms(spreads[k]["median"]) for k in keys]
        bf16 = ms(seconds["ours_bf16"]["step"]["median"])
        parts.append([point, *cells, ms(row["limit"]["median"]), row["limit_way"], bf16, again])
        ratios = row["memory_ratio"] | {"ours_recomputed": row["recomputed_ratio"].get("trl_default")}
        shares = [
            _optional(row["peak_bytes"], k, mb) + (f" ({times(ratios[k])})" if ratios.get(k) else "")
            for k in HOLDERS
        ]
        memory.append([point, mb(row["peak_bytes"]["ours"]), *shares])
    lines = [
        f"A step on one context with one or several answers: random hybrid of {found['parameters'] / 1e6:.1f} "
        f"million parameters, fp32 for everybody, APOLLO of rank {found['rank']} here. TRL is timed at its own "
        "`training_step`, then the optimizer; its defaults are bf16 autocast and gradient checkpointing. "
        "Numbers of peers say how many times as long as ours they take; on CPUs TRL's head scores the context's "
        "positions too. The limit is the sum of what no such step can avoid, "
        "each part timed alone in the same turns: reading the context without gradients, forward and backward "
        "of the answers, the update; beside it, the same limit with fused AdamW as the update. Parts are timed "
        "apart from the whole, so that a share can come out a little above 100%.",
        "",
        *table(
            [
                "context + answer tokens, answers",
                "ours",
                "of the limit's speed",
                "with AdamW's update",
                *PEERS.values(),
            ],
            speeds,
        ),
        "",
        "The limit's parts, in ours and in the plain way (transformers' forward, dense gradients, dense update); "
        "the faster way counts. Last: ours on weights in bf16, as a server holds them (computed in fp32, rounded "
        "stochastically), and ours with the layers recomputed in backward.",
        "",
        *table(
            [
                *("", "reading the context", "forward, backward", "update"),
                *("plain: reading", "plain: forward, backward", "plain: update", "AdamW's update"),
                *("limit", "way", "ours, bf16 weights", "ours, recomputing"),
            ],
            parts,
        ),
        "",
        "Peak of what torch allocates during a step, above its start, and in brackets what ours takes of it. "
        "Weights and optimizer state are there before.",
        "",
        *table(["", "ours", *HOLDERS.values()], memory),
    ]
    pairs: list[list[str]] = []
    chosen = [k for k in PEERS if k != "plain_adamw"]
    for row in found["pairs"]:
        over = [_optional(row["over_ours"], k, lambda v: both(v, times)) for k in chosen]
        held = [_optional(row["memory_ratio"], k, times) for k in ("trl", "trl_default")]
        mine = ms(row["seconds"]["ours"]["step"]["median"])
        pairs.append([f"{row['context']} + 2 × {row['answer']}", mine, *over, *held])
    return [
        *lines,
        "",
        "The same for a DPO pair; the reference log-probabilities are known to both before the step. The last two: "
        "our peak memory over theirs.",
        "",
        *table(
            ["context + answers", "ours", *(PEERS[k] for k in chosen), "memory, fp32", "memory, defaults"],
            pairs,
        ),
    ]


def _optimizer(found: dict[str, Any]) -> list[str]:
    names = {
        "sgd_fused": "SGD fused (reads and writes, no state)",
        "adamw_fused": "AdamW fused",
        "adamw_foreach": "AdamW foreach",
    }
    for rank in found["ranks"]:
        mini = " (Mini)" if rank == 1 else ""
        names[f"factored_{rank}"] = f"ours, factored, rank {rank}{mini}"
        names[f"dense_{rank}"] = f"ours, dense, rank {rank}{mini}"
        names[f"public_{rank}"] = f"public APOLLO, rank {rank}{mini}"
    rows: list[list[str]] = []
    for key, name in names.items():
        if key not in found["seconds"]:
            continue
        state, seconds = found["state_bytes"][key], found["seconds"][key]
        kept = mb(state["moments"]) + (f" + {mb(state['other'])}" if state["other"] > 1e5 else "")
        rows.append(
            [
                name,
                _optional(seconds, "form", lambda v: ms(v["median"])),
                both(seconds["step"], ms),
                ms(found["with_gradient"][key]["median"]),
                kept if sum(state.values()) else "none",
            ]
        )
    ratios: list[list[str]] = []
    keys = ("factored_over_public", "dense_over_public", "factored_over_adamw", "dense_over_adamw")
    for row in found["rows"]:
        cells = [_optional(row, key, lambda v: both(v, times)) for key in keys]
        ratios.append([str(row["rank"]), *cells, percent(row["state_over_bound"])])
    shapes = ", ".join(f"{n} of {a} × {b}" for a, b, n in found["shapes"])
    return [
        f"The matrices of {found['parameters'] / 1e6:.1f} million parameters ({shapes}; norms, no embedding), "
        f"fp32, gradients of {found['tokens']} tokens. The factored form takes the factors as they are; for the "
        "others the dense gradient is formed first. Projections are drawn anew at every step here (timed) "
        "and every 200 by the public package (not timed). State: moments, and what else is kept, projections "
        "among it.",
        "",
        *table(["", "forming the gradient", "step", "together", "state"], rows),
        "",
        "Ours over theirs: the factored step against forming the gradient and stepping, the dense step "
        "against the step alone. State: of a matrix, relative to 2 · rank · longer side floats, at most.",
        "",
        *table(
            [
                *("rank", "factored vs public APOLLO", "dense vs public APOLLO"),
                *("factored vs AdamW fused", "dense vs AdamW fused", "state"),
            ],
            ratios,
        ),
        "",
        "[Where the time goes, and why not less](decisions/what-an-update-costs.md).",
    ]


GROWTHS = {
    "context": ("growth-context.svg", "with the context", "context tokens"),
    "answers": ("growth-answers.svg", "with the answers to one context", "answers"),
    "model": ("growth-model.svg", "with the model", "parameters"),
}
STEPS = {"ours": "context frozen", "whole": "whole rows"}


def _growth(found: dict[str, Any]) -> list[str]:
    lines = [
        f"One step, answers of {found['answer']} tokens, {found['repeats']} turns each, on double-logarithmic "
        "axes: with the context frozen, and over whole rows (labels of the context -100), the latter where it is "
        "affordable.",
    ]
    for key, (file, title, _) in GROWTHS.items():
        series = found[key]
        power = series["exponent"]
        lines += [
            "",
            f"![Time and memory {title}](figures/{file})",
            "",
            f"{title[0].upper()}{title[1:]}: over the upper half of the points, time grows with the power "
            f"{power['seconds']:.2f}, memory with {power['peak_bytes']:.2f}.",
            "",
        ]
        rows: list[list[str]] = []
        for row in series["rows"]:
            about = f"{row['parameters'] / 1e6:.1f}M" if key == "model" else str(row[series["over"]])
            cells = [_optional(row["seconds"], k, lambda v: both(v, ms)) for k in STEPS]
            held = [_optional(row["peak_bytes"], k, mb) for k in STEPS]
            rows.append([about, *cells, *held])
        names = [f"{what}, {how}" for what in ("time", "memory") for how in STEPS.values()]
        lines += table([GROWTHS[key][2], *names], rows)
    return lines


ARMS = {
    "apollo": "APOLLO",
    "mini": "APOLLO-Mini",
    "adam_floored": "Adam, our floors",
    "adamw": "AdamW",
}


def _projections(found: dict[str, Any]) -> list[str]:
    rows: list[list[str]] = []
    for kind, name in (("real", "corrections"), ("random", "random, rank 4")):
        for row in found["rows"][kind]:
            cells = [
                f"{percent(row[k]['error']['median'])} ({row[k]['q05']:.2f} to {row[k]['q95']:.2f})"
                for k in ("signs", "gaussians")
            ]
            rows.append([f"{name}, rank {row['rank']}", *cells, _interval(row["difference"], _points)])
    second = [
        [
            str(row["rank"]),
            *(both(row["losses"][k], "{:.3g}".format) for k in ("signs", "gaussians")),
            _interval(row["ratio"], times),
        ]
        for row in found["trained"]
    ]
    first = found["rows"]["real"][0]
    return [
        "APOLLO's paper projects with Gaussians, this one with signs "
        "([why](decisions/signs-instead-of-gaussians.md)). Both are compared with full-rank Adam: the error of the "
        f"scales after {found['gradients']} gradients, mean over the channels (rank 1: the matrix), median of "
        f"{first['seeds']} seeds; in brackets the ratio to the exact scale, its 5 % and 95 % quantiles. "
        "Difference: signs minus Gaussians in percentage points, with its 95 % interval over the seeds. "
        "At rank 1 a projection may come out near zero, so that single errors are huge.",
        "",
        *table(["gradients", "signs", "Gaussians", "difference"], rows),
        "",
        "![Error of the scales over the rank, signs and Gaussians](figures/projections.svg)",
        "",
        f"The loss on six corrections after {found['steps']} steps at lr {found['lr']:g}, from "
        f"{found['start_loss']:.3g}, by both kinds, {found['trained'][0]['ratio']['n']} seeds; the ratio is the "
        "geometric mean over the seeds with its 95 % interval.",
        "",
        *table(["rank", "signs", "Gaussians", "signs over Gaussians"], second),
    ]


def _points(value: float) -> str:
    return f"{100 * value:+.2f}"


def _interval(found: dict[str, float], form: Format) -> str:
    return f"{form(found['mean'])} ({form(found['low'])} to {form(found['high'])})"


def _flatness(found: dict[str, Any]) -> list[str]:
    arms = found["arms"]
    kinds: list[tuple[str, str, Format]] = [
        ("steps", "steps", "{:.0f}".format),
        ("distance from the start", "distance", "{:.3g}".format),
        ("KL to the start on other requests", "kl", "{:.2g}".format),
        ("loss on directions that were not taught", "untaught_loss", "{:.2g}".format),
        ("curvature, random directions, corrections", "taught_random_curvature", "{:.3g}".format),
        ("curvature, random directions, other requests", "others_random_curvature", "{:.2g}".format),
        ("curvature, own update, corrections", "taught_own_curvature", "{:.3g}".format),
        ("the same per squared length", "taught_own_curvature_per_length", "{:.3g}".format),
    ]
    rows = [[name, *(both(arms[a]["figures"][key], form) for a in ARMS)] for name, key, form in kinds]
    return [
        f"{found['num_taught']} corrections are taught down to a twentieth of their loss by four optimizers at lr "
        f"{found['lr']:g} (APOLLO with rank {found['rank']}, APOLLO-Mini with 1, Adam with APOLLO's floors but no "
        f"projection, torch's AdamW; fp32, no weight decay), {found['seeds']} seeds. Around where each ends, the "
        f"loss along {found['num_directions']} random directions (rows as long as the weights', the same for all) "
        "and along its own update: -1 is the start, 0 the end, 1 as far again. Curvature is the second difference, "
        "medians and extremes over the seeds. What follows: "
        "[chosen for memory, not for flatness](decisions/apollo-for-memory-not-flatness.md).",
        "",
        *table(["", *ARMS.values()], rows),
        "",
        "![Loss along random directions and along the own update](figures/flatness.svg)",
        "",
        *(_verdict(arms, key, where) for key, where in VERDICTS),
    ]


VERDICTS = (
    ("taught_random_curvature", "Along random directions, on the corrections"),
    ("others_random_curvature", "Along random directions, on other requests"),
    ("taught_own_curvature_per_length", "Along the own update, on the corrections, per squared length"),
)


def _verdict(arms: dict[str, Any], key: str, where: str) -> str:
    """AdamW's figure over APOLLO's, seed by seed, and what that says: only what holds for every seed."""
    said: list[str] = []
    for arm in ("adamw", "adam_floored", "mini"):
        found = arms[arm]["ratio_to_apollo"][key]
        if found["low"] > 1:
            verdict = "APOLLO ended flatter with every seed"
        elif found["high"] < 1:
            verdict = "APOLLO ended **sharper** with every seed"
        else:
            verdict = "the seeds disagree"
        said.append(f"{ARMS[arm]} over APOLLO {both(found, times)}: {verdict}")
    return f"- {where}: {'; '.join(said)}."


def figures(results: dict[str, Any]) -> dict[str, str]:
    """The page's charts, by the name of their file."""
    drawn: dict[str, str] = {}
    if "projections" in results:
        drawn["projections.svg"] = _projections_figure(results["projections"]["measured"])
    if "flatness" in results:
        drawn["flatness.svg"] = _flatness_figure(results["flatness"]["measured"])
    if "growth" in results:
        for key, (file, title, over) in GROWTHS.items():
            drawn[file] = _growth_figure(results["growth"]["measured"][key], key, title, over)
    if "vllm_serving" in results:
        drawn[vllm_page.FIGURE] = vllm_page.figure(results["vllm_serving"]["measured"])
    return drawn


def _growth_figure(series: dict[str, Any], key: str, title: str, over: str) -> str:
    panels: list[Panel] = []
    for figure, name in (("seconds", "seconds"), ("peak_bytes", "bytes at the peak")):
        lines: list[Line] = []
        for look, step in enumerate(STEPS):
            points: list[tuple[float, float, float, float]] = []
            for row in series["rows"]:
                if step in row[figure]:
                    at = row[figure][step]
                    spread = (at["median"], at["low"], at["high"]) if figure == "seconds" else (at, at, at)
                    points.append((float(row[series["over"]]), *spread))
            if points:
                lines.append(Line(look, points))
        panels.append(Panel(name[0].upper() + name[1:], over, name, lines, log=True))
    said = [
        f"{row[series['over']]}: "
        + ", ".join(f"{s['median']:.3g} s {STEPS[k]}" for k, s in row["seconds"].items())
        for row in series["rows"]
    ]
    return draw(
        panels,
        list(STEPS.values()),
        key=f"growth-{key}",
        title=f"Time and memory {title}",
        text="; ".join(said),
    )


def _projections_figure(found: dict[str, Any]) -> str:
    panels: list[Panel] = []
    for kind, title in (("real", "Gradients of corrections"), ("random", "Random gradients of rank 4")):
        rows = [r for r in found["rows"][kind] if r["rank"] > 1] or found["rows"][kind]
        lines = [
            Line(
                look,
                [
                    (math.log2(r["rank"]), *(100 * r[k]["error"][part] for part in ("median", "low", "high")))
                    for r in rows
                ],
            )
            for look, k in enumerate(("signs", "gaussians"))
        ]
        names = {math.log2(r["rank"]): str(r["rank"]) for r in rows}
        panels.append(Panel(title, "rank", "mean error of the scales, %", lines, names=names))
    text = "; ".join(
        f"{kind}, rank {r['rank']}: {100 * r['signs']['error']['median']:.3g} % signs, "
        f"{100 * r['gaussians']['error']['median']:.3g} % Gaussians"
        for kind in ("real", "random")
        for r in found["rows"][kind]
    )
    return draw(
        panels,
        ["signs (median, extremes)", "Gaussians"],
        key="projections",
        title="Error of the scales",
        text=text,
    )


def _flatness_figure(found: dict[str, Any]) -> str:
    arms = found["arms"]
    panels: list[Panel] = []
    for where, along, x_label in (
        ("random", "random directions", "share of the weights' norm"),
        ("own", "the own update", "−1: the start, 0: the end"),
    ):
        for on, name in (("taught", "corrections"), ("others", "other requests")):
            lines = [
                Line(look, _through_zero(found[f"{where}_alphas"], arms[arm], f"{on}_{where}", f"{on}_loss"))
                for look, arm in enumerate(ARMS)
            ]
            top = 4 * max(p[1] for line in lines for p in line.points)
            panels.append(
                Panel(f"Along {along}: {name}", x_label, "loss, nats per token", lines, top, mark=0.0)
            )
    figures = [
        f"{name}: curvature {arms[arm]['figures']['taught_random_curvature']['median']:.3g} in random directions, "
        f"{arms[arm]['figures']['taught_own_curvature']['median']:.3g} along its own update"
        for arm, name in ARMS.items()
    ]
    return draw(
        panels,
        list(ARMS.values()),
        key="flatness",
        title="Loss around what four optimizers found, at the same training loss",
        text="On the corrections. " + "; ".join(figures),
    )


def _through_zero(
    alphas: list[float], arm: dict[str, Any], curve: str, middle: str
) -> list[tuple[float, float, float, float]]:
    """The curve with its point at 0: (alpha, median, lowest, highest)."""
    known = [*zip(alphas, arm["curves"][curve], strict=True), (0.0, arm["figures"][middle])]
    return [(alpha, at["median"], at["low"], at["high"]) for alpha, at in sorted(known, key=lambda p: p[0])]


SECTIONS: list[tuple[str, str, Callable[[dict[str, Any]], list[str]]]] = [
    ("serving", "Serving while it learns", _serving),
    ("engine", "Generation", _engine),
    ("step", "One training step", _step),
    ("training", "One training step beside TRL", _training),
    ("optimizer", "The optimizer beside its peers", _optimizer),
    ("real", "A real model", _real),
    ("growth", "How a training step grows", _growth),
    ("rounding", "Rounding, and the optimizer", _rounding),
    ("undo", "Undo", _undo),
    ("memory", "Copies of the weights", _memory),
    ("projections", "Signs instead of Gaussians", _projections),
    ("flatness", "Flatness", _flatness),
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
        "in the same run, turn by turn; so it says more than the milliseconds, which are this machine's. Nobody's "
        "memory goes back to the system between turns.",
        "",
        *_machines(results),
    ]
    for name, title, section in SECTIONS:
        if name in results:
            entry = results[name]
            lines += ["", f"## {title}", "", *section(entry["measured"]), "", _where(entry)]
    if any(name in results for name in vllm_page.PARTS):
        lines += ["", "## Inside vLLM", "", *vllm_page.section(results), "", vllm_page.where(results)]
    return "\n".join(lines) + "\n"
