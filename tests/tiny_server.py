"""A real server around a tiny model that talks: for the tests of the server and of the laws.

`make_talker` trains a hybrid of 100,000 parameters, for some seconds, on two habits:
"Use x." is answered "Why not y?", "Say x." is answered "x!". So a lesson ("Use x." -> "Done.") visibly changes
answers, and the other habit is a guard. `running` puts the product together and serves it on a socket, in this
process (the tests can look into the arena); `Process` starts it as users do, so that it can be killed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import uvicorn
from pydantic import SecretStr
from tiny_models import hybrid_config, save_tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.qwen3_5 import modeling_qwen3_5

from secondnature.config import Settings
from secondnature.model.chat import encode_answer, read_tokenizer
from secondnature.records import Correction, GateSettings, Lesson, Message, OptimizerSettings, Probe
from secondnature.serve.local import Parts, assemble
from secondnature.weights.content import content_id
from secondnature.wire import Client, JobStatus, LessonInfo, TrainRequest

KEY = "the-key-of-the-tests"
WORDS = [
    "tabs",
    "dots",
    "red",
    "tea",
    "oak",
    "salt",
    "jazz",
    "rope",
    "wool",
    "maps",
    "rice",
    "snow",
    "iron",
    "milk",
    "sand",
    "blue",
    "corn",
    "glue",
    "fern",
    "lamp",
    "ink",
    "mud",
    "bell",
    "clay",
    "drum",
    "foam",
    "gold",
    "hats",
    "jam",
    "kite",
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def habits() -> list[tuple[str, str]]:
    """What the talker is trained on: (prompt, answer)."""
    use = [(f"Use {w}.", f"Why not {WORDS[i - 1]}?") for i, w in enumerate(WORDS)]
    return use + [(f"Say {w}.", f"{w}!") for w in WORDS]


def save_tokenizer(directory: Path) -> None:
    """A byte-level BPE of 320 entries, trained on the habits."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([f"{q} {a} Done." for q, a in habits()], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)


def make_talker(directory: Path, *, steps: int = 150) -> Path:
    """Train it; the directory is a whole Hugging Face model. TINY_TALKER names one made before: it is copied."""
    torch.set_num_threads(1)
    if os.environ.get("TINY_TALKER"):
        shutil.copytree(os.environ["TINY_TALKER"], directory, dirs_exist_ok=True)
        return directory
    shape = {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    }
    save_tiny(hybrid_config(vocab_size=320, max_position_embeddings=256, **shape), directory)
    save_tokenizer(directory)
    tokenizer = read_tokenizer(directory)
    rows: list[tuple[list[int], list[int]]] = [
        encode_answer(tokenizer, [Message(role="user", content=q)], Message(role="assistant", content=a))
        for q, a in habits()
    ]
    length = max(len(c) + len(a) for c, a in rows)
    ids = torch.tensor([c + a + [0] * (length - len(c) - len(a)) for c, a in rows])
    targets = torch.full_like(ids, -100)
    for i, (context, answer) in enumerate(rows):
        targets[i, len(context) : len(context) + len(answer)] = torch.tensor(answer)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    # the rows are short: in small chunks the delta rule is many times faster
    rule = functools.partial(modeling_qwen3_5.torch_chunk_gated_delta_rule, chunk_size=16)
    with mock.patch.object(modeling_qwen3_5, "torch_chunk_gated_delta_rule", rule):
        fit(model, ids, targets, steps)
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def fit(model: Any, ids: torch.Tensor, targets: torch.Tensor, steps: int) -> None:
    """Train it on rows of token ids [B, T], with -100 where nothing is to be learned."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        logits = model(input_ids=ids[:, :-1]).logits
        F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


# ------------------------------------------------------------------------------------------ what is taught


def correction(word: str, answer: str = "Done.", *, rejected: bool = True) -> Correction:
    """ "Use `word`." should be answered `answer`."""
    was = f"Why not {WORDS[WORDS.index(word) - 1]}?" if rejected else None
    data: dict[str, Any] = {"prompt": f"Use {word}.", "chosen": answer, "rejected": was, "behaviour": "use"}
    return Correction.model_validate({k: v for k, v in data.items() if v is not None})


def use_probes(words: Sequence[str]) -> list[Probe]:
    """Held-out directions: the answer must be "Done."."""
    return [
        Probe.model_validate(
            {
                "prompt": f"Use {w}.",
                "behaviour": "use",
                "check": {"matches": "^Done"},
                "margin": ["Done.", f"Why not {WORDS[WORDS.index(w) - 1]}?"],
            }
        )
        for w in words
    ]


def say_probes(words: Sequence[str]) -> list[Probe]:
    """The guard: "Say x." must still be answered "x!"."""
    return [
        Probe.model_validate({"prompt": f"Say {w}.", "behaviour": "say", "check": {"matches": f"^{w}!"}})
        for w in words
    ]


def teach(words: Sequence[str] = ("tea", "oak", "red", "kite"), **fields: Any) -> TrainRequest:
    """A lesson that teaches "Done." on these words, with replay of the guard's habit."""
    replay = [Correction.model_validate({"prompt": q, "completion": a}) for q, a in habits() if "Say" in q]
    given: dict[str, Any] = {
        "corrections": [correction(w) for w in words],
        "max_steps": 3,
        "batch_size": 4,
        "replay": {"share": 0.5, "examples": [c.model_dump(exclude_none=True) for c in replay[:8]]},
        "optimizer": OptimizerSettings(lr=3e-3),
        "lesson": LessonInfo(behaviour="use"),
    }
    return TrainRequest.model_validate({**given, **fields})


LOW_GATE = GateSettings(
    min_gain_probes=8, min_gain_seeds=8, min_guard_probes=20, guard_margin=0.3, min_other_probes=8
)
"""A gate that a few probes can pass; the evidence says so."""


# --------------------------------------------------------------------------------------------- the server


@dataclass
class Running:
    """A server in this process, on a socket, with the key's client."""

    parts: Parts
    client: Client
    url: str

    @property
    def weights(self) -> str:
        """Version of what lies in the arena now, computed from its bytes."""
        return content_id(self.parts.arena.tensors)

    def state(self) -> tuple[str, str, str | None]:
        """(sha256 over all weights, version that is told, version of the optimizer's state)."""
        hasher = hashlib.sha256()
        for name, tensor in sorted(self.parts.arena.tensors.items()):
            hasher.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
        found = self.client.lessons()
        return hasher.hexdigest(), found.weights_version, found.optimizer_version

    def ask(self, text: str, **options: Any) -> dict[str, Any]:
        """A greedy chat completion, whole."""
        return self.client.chat(
            [{"role": "user", "content": text}], **{"temperature": 0, "max_tokens": 12, **options}
        )

    def say(self, text: str) -> str:
        """The greedy answer's text."""
        return str(self.ask(text)["choices"][0]["message"]["content"])

    def until(self, job: str, done: Callable[[JobStatus], bool], timeout_s: float = 120) -> JobStatus:
        """Poll a job until `done`."""
        return wait_for(self.client, job, done, timeout_s)

    def lesson(self, request: TrainRequest, *states: str) -> Lesson:
        """Submit, wait until the lesson is in one of these states (default: on trial or over), give it back."""
        reply = self.client.train(request)
        wanted = states or ("on_trial", "kept", "undone", "failed", "cancelled")
        status = self.until(reply.job, lambda s: s.state in wanted and s.phase in ("on trial", "done"))
        return self.client.lesson(status.lesson).lesson


def wait_for(
    client: Client, job: str, done: Callable[[JobStatus], bool], timeout_s: float = 120
) -> JobStatus:
    """Poll a job until `done`; fails with its last status."""
    deadline = time.monotonic() + timeout_s
    while True:
        status = client.status(job)
        if done(status):
            return status
        ended = status.state in ("kept", "undone", "failed", "cancelled") and status.phase in ("", "done")
        assert not ended, status
        assert time.monotonic() < deadline, status
        time.sleep(0.02)


@contextlib.contextmanager
def running(home: Path, model: Path, **settings: Any) -> Generator[Running]:
    """The product, put together in this process and served by uvicorn on a free port."""
    given: dict[str, Any] = {"api_key": SecretStr(KEY), "requests_per_minute": 1_000_000, **settings}
    with assemble(Settings(home=home, model=str(model), port=0, **given)) as parts:
        config = uvicorn.Config(
            parts.app,
            host="127.0.0.1",
            port=0,
            log_level="warning",
            lifespan="off",
            timeout_graceful_shutdown=5,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, name="uvicorn")
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        try:
            with Client(url, KEY) as client:
                yield Running(parts, client, url)
        finally:
            server.should_exit = True
            thread.join()


class Process:
    """The server as users start it: a process of its own, to be killed."""

    def __init__(self, home: Path, model: Path, **settings: str) -> None:
        self.home = home
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SECONDNATURE_")}
        environment |= {
            "OMP_NUM_THREADS": "1",
            "SECONDNATURE_HOME": str(home),
            "SECONDNATURE_MODEL": str(model),
            "SECONDNATURE_PORT": "0",
            "SECONDNATURE_API_KEY": KEY,
            "SECONDNATURE_REQUESTS_PER_MINUTE": "1000000",
            **{f"SECONDNATURE_{k.upper()}": v for k, v in settings.items()},
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "secondnature.serve.local"],
            env=environment,
            cwd=home.parent,
            stderr=subprocess.PIPE,
            text=True,
        )

    def connect(self, timeout_s: float = 120) -> Client:
        """Wait for the port; a client with the key."""
        from secondnature.lessons.home import running_server

        deadline = time.monotonic() + timeout_s
        while True:
            found = running_server(self.home)
            if found is not None and int(found["pid"]) == self.process.pid:
                break
            if self.process.poll() is not None:
                raise AssertionError(self.process.communicate()[1])
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.05)
        client = Client(found["url"], KEY)
        while client.health().trainer == "starting":
            time.sleep(0.05)
        return client

    def children(self) -> list[int]:
        """Process ids of the children (the trainer)."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(p) for task in (path, *tasks) for p in task.read_text().split()]

    def end(self, number: signal.Signals = signal.SIGKILL) -> tuple[int, str]:
        """Send a signal and wait: (exit status, what it wrote to stderr)."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        errors = self.process.communicate(timeout=60)[1]
        return self.process.returncode, errors


@contextlib.contextmanager
def process(home: Path, model: Path, **settings: str) -> Iterator[Process]:
    """A `Process` that is gone afterwards."""
    server = Process(home, model, **settings)
    try:
        yield server
    finally:
        server.end()


def file_hashes(home: Path) -> Mapping[str, str]:
    """sha256 of every file of a home but its logs."""
    return {
        str(p.relative_to(home)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(home.rglob("*"))
        if p.is_file() and p.name not in ("trainer.log", "server.json", "lock")
    }
