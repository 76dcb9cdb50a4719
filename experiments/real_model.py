"""A real model, six corrections: the server's lesson beside what people would do instead, and where it stops.

    python experiments/real_model.py        SmolLM2, three seeds, every arm: an hour of a core; then the page

Needs the extras `smollm2` and `bench` (TRL, peft). Every arm and seed is a process of its own and leaves a JSON
file in `--work`; what is there is not run again. The seeds teach other corrections in another order; weights
before, probes and arithmetic are the same. The server's lesson is looked at between its steps, far past where its
development probes stop it: what counts is the stop, and the rest shows what would have come.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "examples" / "directions")]

import make as data  # pyright: ignore[reportMissingImports]
import real_page
from real_cost import Cost, Watched

if TYPE_CHECKING:
    from real_probes import Measured, Told

    from secondnature.records import Probe

Row = dict[str, Any]
OUT = ROOT / "docs" / "experiments"
ARMS = ("before", "ours", "served", "prompting", "turns", "sft", "lora", "dpo")
SEEDS = (0, 1, 2)
STEPS = 16
"""Of the arms that are not told when to stop."""
CURVES = {0: (4, 8, 12, 16, 24), 1: (8, 16), 2: (8, 16)}
"""By seed: steps of the server's lesson after which everything is looked at, beside that of the stop."""
TEXT_TOKENS = 512
PARTS = {"right": (1, 2), "other": (3, 6), "facts": (3, 12), "arithmetic": (5, 10)}
"""Every how many probes are asked: before, and of an arm."""


def lesson_file() -> Row:
    """The settings of examples/directions."""
    return tomllib.loads((ROOT / "examples/directions/lesson.toml").read_text(encoding="utf-8"))


def body(seed: int, *, to_the_end: bool) -> Row:
    """The request of the server's lesson, as examples/directions has it; `to_the_end`: of the curve, no stop."""
    settings = lesson_file()
    behaviour = settings.pop("behaviour")
    for key in ("note", "gate"):
        settings.pop(key, None)
    if to_the_end:
        settings.pop("until_passed")
        settings["max_steps"] = CURVES[seed][-1]
    return {
        **settings,
        "seed": seed,
        "lesson": {"behaviour": behaviour},
        "corrections": data.corrections(seed),
        "development": data.development(),
        "replay": {**settings.get("replay", {}), "prompts": data.replay_prompts(), "lessons": False},
    }


def told(arm: str, seed: int) -> Told | None:
    """How a question is asked with the corrections in its context; None: the arm asks it plainly."""
    from secondnature.records import Message

    rows = data.corrections(seed)
    shown = "\n\n".join(f"Asked: {r['prompt']}\nAnswer: {r['chosen']}" for r in rows)
    turns: list[Message] = []
    for row in rows:
        turns += [
            Message(role="user", content=row["prompt"]),
            Message(role="assistant", content=row["chosen"]),
        ]

    def in_the_question(text: str) -> list[Message]:
        asked = (
            f"Answer as in these examples.\n\n{shown}\n\nAsked: {text}\nAnswer:"  # as the server's own arm
        )
        return [Message(role="user", content=asked)]

    def as_turns(text: str) -> list[Message]:
        return [*turns, Message(role="user", content=text)]

    return {"prompting": in_the_question, "turns": as_turns}.get(arm)


class Judge:
    """What is asked of the weights of every arm."""

    def __init__(self, directory: Path, seed: int) -> None:
        from real_probes import Measured

        from secondnature.evidence.packs import pack
        from secondnature.records import Probe

        rows = [Probe.model_validate(row) for row in data.probes()]
        self.probes: dict[str, list[Probe]] = {
            "right": [p for p in rows if p.side == "right"],
            "other": [p for p in rows if p.side == "other"],
            "facts": list(pack("facts")),
            "arithmetic": list(pack("arithmetic")),
        }
        self.development = [Probe.model_validate(row) for row in data.development()]
        self.model: Measured = Measured(directory, text())
        general = [p.prompt[-1].content for p in self.development if p.side == "other"]
        self.model.start({"new": [r["prompt"] for r in data.corrections(seed)], "other": general})

    def measure(self, part: int = 0, told: Told | None = None) -> Row:
        """Everything; `part`: which of `PARTS`."""
        passed: dict[str, str] = {}
        for name, probes in self.probes.items():
            passed[name] = "".join("01"[x] for x in self.model.ask(probes[:: PARTS[name][part]], told))
        asked = {name: [p.prompt[-1].content for p in probes] for name, probes in self.probes.items()}
        shown = asked["right"][:3] + asked["facts"][:80:40]
        style = asked["other"][::16]
        return {
            "passed": passed,
            "said": dict(zip(shown, self.model.answers(shown, 24, told), strict=True)),
            "whole": dict(zip(style, self.model.answers(style, 32, told), strict=True)),
            "kl": self.model.kl() if told is None else {},
            "perplexity": self.model.perplexity(TEXT_TOKENS) if told is None else None,
        }

    def develops(self) -> Row:
        """How many development probes pass, by side."""
        marks = list(zip(self.development, self.model.ask(self.development), strict=True))
        return {side: [m for p, m in marks if p.side == side] for side in ("right", "other")}


def text() -> str:
    """WikiText-2, its validation part."""
    folder = os.environ.get("SECONDNATURE_REALDATA")
    if not folder:
        raise SystemExit("set SECONDNATURE_REALDATA to the folder that has data/wikitext2-valid-test")
    path = Path(folder) / "data/wikitext2-valid-test/wikitext-2/valid.txt"
    return path.read_text(encoding="utf-8")[:20_000]


def ours(directory: Path, seed: int) -> Row:
    """The server's lesson, looked at all the way; what it would have left where it stops."""
    from real_arms import lesson

    judge = Judge(directory, seed)
    share, last = lesson_file()["until_passed"], CURVES[seed][-1]
    curve: list[Row] = []
    looks: list[Row] = []
    found: Row = {}

    def look(step: int, tensors: Any) -> None:
        if "steps" in found and step not in CURVES[seed]:
            return
        judge.model.load(tensors)
        marks = judge.develops()
        row: Row = {"step": step, "development": {side: sum(m) for side, m in marks.items()}}
        reached = sum(marks["right"]) >= share * len(marks["right"])
        looks.append(row)
        print(f"  seed {seed}, step {step}: {row['development']}", flush=True)
        stops = "steps" not in found and step > 0 and (reached or step == last)
        if stops or step in CURVES[seed]:
            curve.append({**row, **judge.measure(1)})
        if stops:
            found.update(curve[-1], steps=step, stopped_by="until_passed" if reached else "max_steps")

    done, metrics = lesson(directory, body(seed, to_the_end=True), look)
    losses = [m["loss"] for m in metrics if m["kind"] == "step"]
    return {**found, "curve": curve, "looks": looks, "losses": losses, "trained": done.steps}


def served(seed: int) -> Row:
    """The same lesson by a server, for its time and memory, and to see that it stops there, too."""
    import tempfile

    from secondnature.cli.connect import Where, open_server
    from secondnature.cli.output import Output
    from secondnature.records import OPEN_STATES
    from secondnature.wire import TrainRequest

    with (
        tempfile.TemporaryDirectory() as home,
        open_server(Where(home=Path(home), model="smollm2"), Output()) as server,
        Watched() as cost,
    ):
        client = server.client
        reply = client.train(TrainRequest.model_validate({**body(seed, to_the_end=False), "keep": True}))
        while client.status(reply.job).state in OPEN_STATES:
            time.sleep(0.5)
        assert reply.lesson is not None
        lesson = client.lesson(reply.lesson).lesson
    return {"steps": lesson.steps, "stopped_by": lesson.stopped_by, "kl": lesson.kl, "cost": cost.found()}


def run(arm: str, seed: int, directory: Path) -> Row:
    """One arm of one seed, in this process."""
    if arm == "ours":
        return ours(directory, seed)
    if arm == "served":
        return served(seed)
    how = told(arm, seed)
    if arm == "before" or how is not None:
        return Judge(directory, seed).measure(int(arm != "before"), how)
    from real_arms import peer

    with Cost() as cost:
        tensors = peer(arm, directory, data.corrections(seed), steps=STEPS, seed=seed)
    judge = Judge(directory, seed)
    judge.model.load(tensors)
    return {**judge.measure(1), "steps": STEPS, "cost": cost.found()}


def about() -> Row:
    """What the page says of the settings, and the places of those guards that our lesson replays."""
    from secondnature.evidence.packs import pack

    settings = lesson_file()
    prompts = {row["prompt"] for row in data.replay_prompts()}
    return {
        "text": "WikiText-2",
        "replayed": {
            name: [i for i, p in enumerate(pack(name)[:: PARTS[name][0]]) if p.prompt[-1].content in prompts]
            for name in real_page.GUARDS
        },
        "settings": {
            "lr": settings["optimizer"]["lr"],
            "replayed": len(data.replay_prompts()),
            "development": len(data.development()),
            "look_every": settings["look_every"],
            "until": settings["until_passed"],
            "steps": STEPS,
        },
    }


def main() -> int:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/real-model"))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--one", action="store_true", help="the one arm and seed, in this process")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    arms, seeds = options.arms.split(","), [int(s) for s in options.seeds.split(",")]
    for seed, arm in ((s, a) for s in seeds for a in arms):
        path = options.work / f"{arm}-{seed}.json"
        if path.exists() or (arm == "before" and seed):
            continue
        if options.one:
            from secondnature.model.gguf import directory_of, smollm2

            found = {"arm": arm, "seed": seed, **run(arm, seed, directory_of(smollm2()))}
            path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            continue
        print(f"{arm}, seed {seed}", flush=True)
        command = [sys.executable, __file__, "--one", "--arms", arm, "--seeds", str(seed)]
        subprocess.run([*command, "--work", str(options.work)], check=True)
    if not options.one:
        real_page.write(options.work, OUT, about())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
