"""Build the embedded model: `python -m secondnature.embedded.build --seed S`.

Tokenizer, training, evaluation, model card and the loadable directory, from one seed and no download. Resumes from
`--work` by itself. On a terminal there is a progress bar, in a log plain lines. An hour and a half on one core;
`--device cuda` takes batches of 65,536 tokens and ten times the text. Runs alone, in no server's process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from secondnature.embedded.files import load_model, save_model

if TYPE_CHECKING:
    from secondnature.embedded.train import Progress as TrainProgress

QUICK_CATEGORIES = (
    "habit", "accept-with-cue", "hedging", "direct-with-cue", "apology", "no-apology-with-cue", "length",
    "short-with-cue", "habit-under-other-cue", "push-back", "push-back-with-cue", "push-back-on-advice", "code",
    "look-up", "arithmetic", "copy", "self-description", "several-turns",
)  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m secondnature.embedded.build", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tokens",
        type=int,
        help="training tokens before the polish (default: 6 million; on cuda 60 million)",
    )
    parser.add_argument("--stop-at", type=int, help="stop after so many tokens, on the schedule of --tokens")
    parser.add_argument(
        "--out", type=Path, default=Path("embedded-model"), help="where the finished model goes"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("embedded-work"), help="checkpoint, curve, snapshot"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch-tokens", type=int, help="tokens a step (default: 1,024; on cuda 65,536)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument(
        "--look-tokens", type=int, help="a quick evaluation every so many tokens (default: 15 in all)"
    )
    parser.add_argument("--look-cases", type=int, default=40, help="cases per category in a quick evaluation")
    parser.add_argument(
        "--cases", type=int, default=300, help="cases per category in the final evaluation; 0: no card"
    )
    args = parser.parse_args(arguments)
    on_gpu = args.device == "cuda"
    args.tokens = args.tokens or (60_000_000 if on_gpu else 6_000_000)
    args.batch_tokens = args.batch_tokens or (65_536 if on_gpu else 1024)
    args.look_tokens = args.look_tokens or max(1, args.tokens // 15)
    return args


def quick_look(directory: Path, num_cases: int) -> dict[str, float]:
    """Pass rates of the snapshot on a few cases of each category."""
    from secondnature.embedded.answers import greedy, passes
    from secondnature.embedded.scenarios import cases

    model, tokenizer = load_model(directory)
    chosen = [c for category in QUICK_CATEGORIES for c in cases(category, num_cases, "quick")]
    answers = greedy(model, tokenizer, [c.prompt for c in chosen], max_tokens=48)
    rates: dict[str, float] = {}
    for category in QUICK_CATEGORIES:
        good = [passes(c, a) for c, a in zip(chosen, answers, strict=True) if c.category == category]
        rates[category] = round(sum(good) / len(good), 3)
    with (directory.parent / "samples.txt").open("w") as f:
        for case, answer in zip(chosen, answers, strict=True):
            f.write(f"{case.category}|{passes(case, answer)}|{case.prompt[-1]['content']}|{answer}\n")
    return rates


class Reporter:
    """The progress bar, or plain lines, and the curve."""

    def __init__(self, total_tokens: int, work: Path) -> None:
        self.console, self.work = Console(file=sys.stderr), work
        self.total, self.last_line = total_tokens, 0.0
        self.bar = Progress(
            TextColumn("training"), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn(),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("training", total=total_tokens, text="")

    def step(self, progress: TrainProgress) -> None:
        """Move the bar; without a terminal a line every half minute of training."""
        speed = progress.tokens / max(progress.seconds, 1e-9)
        text = (
            f"{progress.tokens:,} of {self.total:,} tokens, loss {progress.loss:.3f}, {speed:,.0f} tokens/s"
        )
        if self.console.is_terminal:
            self.bar.update(self.task, completed=progress.tokens, text=text)
        elif progress.seconds - self.last_line > 30 or progress.step == 1:
            self.last_line = progress.seconds
            minutes = (self.total - progress.tokens) / speed / 60
            self.say(f"step {progress.step}: {text}, {minutes:.0f} min left")

    def say(self, text: str) -> None:
        """One line, at once."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def go_on_at(self, tokens: int) -> None:
        """Drop the curve's points that a killed run looked at after its last checkpoint: they come again."""
        file = self.work / "curve.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        file.write_text("".join(f"{x}\n" for x in lines if json.loads(x)["tokens"] <= tokens))

    def curve(self, progress: TrainProgress, rates: dict[str, float]) -> None:
        """Append a point of the curve to curve.jsonl."""
        point = {
            "tokens": progress.tokens,
            "seconds": round(progress.seconds),
            "loss": round(progress.loss, 4),
        }
        point.update(rates)
        with (self.work / "curve.jsonl").open("a") as f:
            f.write(json.dumps(point) + "\n")
        self.say(json.dumps(point))


def main(arguments: list[str] | None = None) -> int:
    """Train (or go on training), evaluate, write the model to `--out`."""
    args = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers reads it: nothing is downloaded
    import torch
    from transformers.utils import logging

    from secondnature.embedded.shape import fresh_model, text_config
    from secondnature.embedded.tokenizer import load_tokenizer, train_tokenizer
    from secondnature.embedded.train import POLISH_SHARE, Pretrainer, Settings

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("found no CUDA device; expected one for --device cuda: leave the option out")
    args.work.mkdir(parents=True, exist_ok=True)
    reporter = Reporter(args.tokens + args.tokens // POLISH_SHARE, args.work)
    if (args.work / "tokenizer" / "tokenizer.json").exists():
        tokenizer = load_tokenizer(args.work / "tokenizer")
    else:
        tokenizer = train_tokenizer(args.seed)
        tokenizer.save_pretrained(args.work / "tokenizer")
    pad_id, eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    assert isinstance(pad_id, int)
    assert isinstance(eos_id, int)
    model = fresh_model(text_config(len(tokenizer), pad_id, eos_id), args.seed)
    settings = Settings.for_batches(
        args.batch_tokens, seed=args.seed, tokens=args.tokens, precision=args.precision, device=args.device
    )
    trainer = Pretrainer(model, tokenizer, settings)
    if trainer.load(args.work):
        reporter.say(f"going on at {trainer.progress.tokens:,} tokens")
        reporter.go_on_at(trainer.progress.tokens)
    num_parameters = sum(p.numel() for p in model.parameters())
    reporter.say(f"{num_parameters:,} parameters, {len(tokenizer)} tokens of vocabulary")
    snapshot = args.work / "snapshot"

    def look(progress: TrainProgress) -> None:
        save_model(model, tokenizer, snapshot)
        reporter.curve(progress, quick_look(snapshot, args.look_cases))

    with reporter.bar:
        trainer.run(args.work, reporter.step, look, look_tokens=args.look_tokens, stop_at=args.stop_at)
    save_model(model, tokenizer, args.out)
    if args.cases:
        from secondnature.embedded.evaluate import write_card

        curve = args.work / "curve.jsonl"
        write_card(args.out, args.cases, curve=curve, settings=trainer.settings, say=reporter.say)
    reporter.say(f"done: {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
