"""What a server does with a model, in one process, each step beside plain transformers; the table of the page.

    make test-zoo            drives every architecture, writes the table into docs/start-your-own.md

Everything is the product's own (the engine, the trainer's run, home, log, checkpoint) but HTTP and the processes.
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import ARCHITECTURES, VOCABULARY, make
from engine_models import byte_tokenizer
from safetensors import safe_open
from served_home import Served, serve
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from secondnature import wire
from secondnature.engines.generation import GenerationRequest
from secondnature.engines.local import self_test as engine_test
from secondnature.engines.local.engine import Engine
from secondnature.model.limits import context_limit
from secondnature.model.load import build, bystanders
from secondnature.train import prefix
from secondnature.train.run import TrainingRun
from secondnature.weights import checkpoint

ROOT = Path(__file__).resolve().parents[2]
LENGTHS, ANSWER = (6, 41, 130), 12
TABLE = (ROOT / "docs" / "start-your-own.md", "<!-- zoo -->\n", "<!-- /zoo -->\n")


@dataclass
class Row:
    """What was found of one architecture."""

    name: str
    answers: str = ""
    """Greedy answers, alone and together, equal to transformers' own: k/n."""
    difference: float = 0.0
    """The largest of log-probabilities, in nats."""
    rises: str = ""
    """Log-probability of what was taught, before and after."""
    undone: bool = False
    """The bytes and the answers are those of before."""
    exported: str = ""
    """Greedy answers of the exported directory in transformers, equal to the server's: k/n."""
    exported_difference: float = 0.0


def prompt(num: int) -> list[int]:
    """Ids that no special token of a tiny config has."""
    return [(7 * i + i * i // 3) % 250 + 20 for i in range(num)]


@contextmanager
def oracle(directory: Path) -> Iterator[Any]:
    """Plain transformers, in fp32: all bf16 values are exact in it."""
    config = type(transformers.AutoConfig.from_pretrained(directory))
    speaks_only = config in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    kind: Any = AutoModelForCausalLM if speaks_only else AutoModelForImageTextToText
    model, found = kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"], found
    yield model.eval().requires_grad_(False)


def greedy(model: Any, ids: Sequence[int]) -> list[int]:
    """Its own generation."""
    given = torch.tensor([ids])
    out = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        do_sample=False,
        max_new_tokens=ANSWER,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(ids) :].tolist()


def logps(model: Any, ids: Sequence[int]) -> list[float]:
    """Of each token after the first, in one forward without a cache."""
    whole = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
    return [float(whole[i, token]) for i, token in enumerate(ids[1:])]


def say(
    model: Any, prompts: Sequence[list[int]]
) -> tuple[list[list[int]], list[list[int]], list[list[float]]]:
    """(answers of each prompt alone, all together and twice, log-probabilities of the prompts) by the engine."""
    with Engine(model, byte_tokenizer(), stop_ids=[]) as engine:
        asked = [GenerationRequest(p, max_tokens=ANSWER, temperature=0.0) for p in prompts]
        alone = [list(engine.generate([one])[0].token_ids) for one in asked]
        together = [list(found.token_ids) for found in engine.generate(asked * 2)]
        return alone, together, engine.score([(p[:1], p[1:]) for p in prompts])


def compare(model: Any, reference: Any, prompts: Sequence[list[int]]) -> tuple[str, float]:
    """(k/n answers equal, largest difference of log-probabilities)."""
    alone, together, mine = say(model, prompts)
    wanted = [greedy(reference, p) for p in prompts]
    pairs = list(zip([*alone, *together], wanted * 3, strict=True))
    theirs = [logps(reference, p) for p in prompts]
    worst = max(abs(a - b) for m, t in zip(mine, theirs, strict=True) for a, b in zip(m, t, strict=True))
    return f"{sum(a == b for a, b in pairs)}/{len(pairs)}", worst


def teach(served: Served, model: Any, out: Path) -> str:
    """One lesson of three steps, written down and on trial."""
    context, answer = prompt(30), [40, 41, 42, 43]
    with Engine(model, byte_tokenizer(), stop_ids=[]) as engine:
        score = lambda: sum(engine.score([(context, answer)])[0])  # noqa: E731
        before = score()
        entry = served.begin()
        message = wire.Train(
            job="j",
            lesson=entry.id,
            objective="sft",
            steps=3,
            batch_size=1,
            seed=5,
            examples=[wire.TokenExample(context, answer)],
            replay=[],
            replay_share=0.0,
            replay_weight=1.0,
            learned_loss=0.0,
            optimizer={"lr": 3e-3, "rank": 4},
            optimizer_in=None,
            optimizer_out=str(out / "optimizer.safetensors"),
            development=[],
            until_margin=None,
            until_passed=None,
            look_every=1,
            kl={},
        )
        TrainingRun(model, served.arena, message).run(lambda _: None, lambda: None)
        served.log.save(served.weights.record(entry).model_copy(update={"state": "on_trial"}))
        after = score()
    return f"{before:.1f} → {after:.1f}" if after > before else f"no: {before:.3f} → {after:.3f}"


@torch.no_grad()
def drive(name: str, root: Path) -> Row:
    """Serve, compare, teach, export, undo."""
    row = Row(name)
    directory = make(name, root / "model")
    served = serve(root / "home", directory)
    try:
        model = build(directory, served.arena.tensors)
        engine_test.self_test(model)
        prefix.self_test(model)
        prompts = [prompt(n) for n in LENGTHS if n + ANSWER <= context_limit(model.config)]
        with oracle(directory) as reference:
            row.answers, row.difference = compare(model, reference, prompts)
        before = {n: t.clone() for n, t in served.arena.tensors.items()}
        answers = say(model, prompts)
        with torch.enable_grad():
            row.rises = teach(served, model, root)
        exported = checkpoint.save(root / "out", directory, served.arena.tensors, {"version": "w1"})
        assert beside(exported) == beside(directory), (
            "what the model has beside its text part is exported as it was"
        )
        with oracle(exported) as reference:
            row.exported, row.exported_difference = compare(model, reference, prompts)
        changed = [n for n, t in served.arena.tensors.items() if not torch.equal(t, before[n])]
        served.weights.restore()
        same = all(torch.equal(t, before[n]) for n, t in served.arena.tensors.items())
        row.undone = (
            bool(changed) and same and say(model, prompts)[:2] == answers[:2]
        )  # scores: by who came along
    finally:
        served.home.close()
    return row


def beside(directory: Path) -> dict[str, bytes]:
    """The tensors of a checkpoint that no lesson changes (a vision tower), by their names in the files."""
    found: dict[str, bytes] = {}
    for key, file in bystanders(directory).items():
        with safe_open(file, framework="pt") as stored:
            found[key] = stored.get_tensor(key).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return found


def table(rows: Sequence[Row]) -> str:
    """Markdown, two architectures in a line."""
    cells = [
        f"{r.name} | {r.answers} | {r.difference:.0e} | {r.rises} | {'yes' if r.undone else 'no'} | "
        f"{r.exported}, {r.exported_difference:.0e}"
        for r in rows
    ]
    if len(cells) % 2:
        cells.append(" | " * 5)
    head = "architecture | answers | Δ log p | taught | undone | exported"
    lines = [f"| {head} | {head} |", "|---" * 12 + "|"]
    lines += [f"| {left} | {right} |" for left, right in zip(cells[::2], cells[1::2], strict=True)]
    return "\n".join(lines) + "\n"


def main(names: Sequence[str]) -> None:
    """Drive them, print each, and write the table if all were driven."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows: list[Row] = []
    for name in names or ARCHITECTURES:
        with tempfile.TemporaryDirectory() as root:
            rows.append(drive(name, Path(root)))
        print(", ".join(f"{f.name}: {getattr(rows[-1], f.name)}" for f in fields(Row)), flush=True)
    if not names:
        page, begin, end = TABLE
        text = page.read_text(encoding="utf-8")
        page.write_text(
            re.sub(f"{begin}.*?{end}", lambda _: f"{begin}{table(rows)}{end}", text, flags=re.DOTALL),
            encoding="utf-8",
        )


assert VOCABULARY > 270, "prompts stay inside"
if __name__ == "__main__":
    main(sys.argv[1:])
