"""The local engine, put together: home, arena, engine, trainer, routes, one uvicorn (server process).

    python -m secondnature.serve.local        reads the same settings as `secondnature serve`

Start-up: lock the home, read checkpoint and kept deltas, fill the arena, and only then open the port.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # this module is a process's main; before transformers reads it

import torch
import transformers
import uvicorn
from fastapi import FastAPI
from torch import nn

from secondnature import config
from secondnature.config import Settings
from secondnature.engines.local import self_test as engine_test
from secondnature.engines.local.engine import MAX_HELD_TOKENS, Engine
from secondnature.engines.local.rows import token_bytes
from secondnature.engines.stamps import Clock
from secondnature.errors import ConfigError, SecondnatureError
from secondnature.lessons.home import Home
from secondnature.lessons.log import Log
from secondnature.lessons.runner import Runner
from secondnature.lessons.teaching import Teaching, put_together
from secondnature.lessons.weights import fill_kept
from secondnature.model import chat, load, turns
from secondnature.model.defaults import sampling_defaults
from secondnature.serve import gpu
from secondnature.serve.memory import Growth
from secondnature.serve.place import model_directory, model_name
from secondnature.train.device import prepare
from secondnature.train.prefix import self_test
from secondnature.web.application import local_application
from secondnature.weights import checkpoint
from secondnature.weights.arena import Arena
from secondnature.weights.content import content_id
from secondnature.weights.cuda import DeviceArena
from secondnature.wire import EndToken, Wiring

LOG = logging.getLogger("secondnature")
REACHED_AT = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104
"""How this machine reaches a server that listens on all of its addresses."""
ENGINE_BYTES = 1 << 30
"""Of a GPU: activations of the engine; an estimate."""
COMPUTE_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
"""Of the engine, by setting; None: what `load.build` takes on the device."""
KEEP_ALIVE_S = 30
"""Idle connections are kept longer than clients keep them (httpx: 5 s), or a request may cross with the closing."""


@dataclass
class Parts:
    """What a running server consists of."""

    settings: Settings
    teaching: Teaching
    engine: Engine
    app: FastAPI

    @property
    def home(self) -> Home:
        """Where everything lies."""
        return self.teaching.home

    @property
    def arena(self) -> Arena:
        """The weights."""
        return self.teaching.arena

    @property
    def clock(self) -> Clock:
        """Their version."""
        return self.teaching.clock

    @property
    def runner(self) -> Runner:
        """The one that changes them."""
        return self.teaching.runner


@contextlib.contextmanager
def assemble(settings: Settings) -> Generator[Parts]:
    """A whole server but for the port; taken apart again, in order, however this ends.

    Raises:
        ConfigError, HomeInUse, BadCheckpoint, BadDelta, UnsupportedModel: before anything is served or written.
    """
    torch.set_num_threads(settings.engine_threads)
    directory = model_directory(settings)
    with contextlib.ExitStack() as stack:
        home = Home(settings.home)  # locked before gigabytes are read
        stack.callback(home.close)
        with load.named_fault(directory, "reading its files"):
            arena, max_held_tokens = _reserve(directory, settings.device)
            for name, tensor in checkpoint.stream(directory):
                arena.fill(name, tensor)
            fingerprint = load.fingerprint(directory)
        base_version = content_id(arena.tensors, like=home.base_version())
        home.check(directory, fingerprint, base_version)
        log = Log(home, directory, base_version)
        fill_kept(arena, log)
        clock = Clock(arena, log.kept_version())
        with load.named_fault(directory, "making the model"):
            model = load.build(directory, arena.tensors, compute_dtype=COMPUTE_DTYPES[settings.compute_dtype])
        with load.named_fault(directory, "trying it"):
            engine_test.self_test(model)
            self_test(model)
        tokenizer = chat.read_tokenizer(directory)
        for wrong in chat.look(tokenizer):
            LOG.warning("%s: %s", directory, wrong)
        growth = Growth()
        engine = Engine(
            model,
            tokenizer,
            clock=clock,
            max_rows=settings.max_rows,
            max_waiting=settings.max_queue,
            max_held_tokens=max_held_tokens,
            threads=settings.engine_threads,
            on_step=[
                lambda e: setattr(arena, "load", e.metrics.running + e.metrics.waiting),
                lambda e: growth.look(busy=e.metrics.running + e.metrics.waiting > 0),
            ],
        )
        stack.callback(engine.close)
        teaching = put_together(
            settings,
            home=home,
            log=log,
            arena=arena,
            clock=clock,
            directory=directory,
            engine=engine,
            model=model,
            tokenizer=tokenizer,
            context_limit=engine.limits.context,
            layout="transformers",
            model_name=model_name(settings, directory),
            wiring=lambda: _wiring(model, arena, tokenizer),
        )
        defaults = sampling_defaults(directory) if settings.model_sampling else None
        parts = Parts(settings, teaching, engine, local_application(teaching, engine, tokenizer, defaults))
        home.bind(directory, fingerprint, base_version)  # nothing refuses the model any more
        home.note_settings(settings)
        teaching.runner.start()
        stack.callback(teaching.runner.stop)
        yield parts


def _reserve(directory: Path, device: str) -> tuple[Arena, int]:
    """An arena for the weights of `directory`, empty, and how many tokens' keys and values may be held.

    On a GPU its memory is planned before anything is loaded, and the sums are said.

    Raises:
        ConfigError: no GPU is seen.
        WeightsError: there is not room for weights, keys and values, and the trainer.
    """
    specs = checkpoint.specs(directory)
    if device == "cpu":
        return Arena.reserve(specs), MAX_HELD_TOKENS
    if not torch.cuda.is_available():
        raise ConfigError(
            f"no GPU is seen by torch {torch.__version__}",
            "see nvidia-smi, CUDA_VISIBLE_DEVICES, and whether this torch is a build with CUDA",
        )
    prepare()
    card = torch.device("cuda", 0)
    free, total = torch.cuda.mem_get_info(card)  # with this process's context in place
    planned = gpu.budget(directory, free=free, total=total, num_processes=1, engine=ENGINE_BYTES)
    planned.check()
    LOG.info("%s: %s", torch.cuda.get_device_name(card), planned)
    # twice: while the buffers grow, the old ones are there too
    tokens = planned.left // (2 * max(1, token_bytes(load.read_config(directory), itemsize=2)))
    return DeviceArena.reserve_on(card, specs), min(MAX_HELD_TOKENS, tokens)


def _wiring(model: nn.Module, arena: Arena, tokenizer: Any) -> Wiring:
    """Every parameter of the model is looked up in the arena."""
    slots = {t.data_ptr() for t in arena.tensors.values()}
    parameters = dict(model.named_parameters())
    return Wiring(
        engine="local",
        engine_version=transformers.__version__,
        tensors=len(parameters),
        aliased=sum(p.data_ptr() in slots for p in parameters.values()),
        nbytes=arena.nbytes,
        writes=arena.writes[0],
        cache="none",
        problems=[f"{n} is not in the arena" for n, p in parameters.items() if p.data_ptr() not in slots],
        ends=[EndToken.model_validate(e._asdict()) for e in turns.endings(tokenizer)],
    )


def main(settings: Settings) -> int:
    """Serve until a signal comes; the exit status."""
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    transformers.logging.set_verbosity_error()  # it warns of kernels that no CPU has
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn hands its signals on when it has stopped
        signal.signal(number, _leave)
    with assemble(settings) as parts:
        listener = _listen(settings)
        host, port = listener.getsockname()[:2]
        host = REACHED_AT.get(str(host), str(host))
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        options: dict[str, Any] = {"log_level": "warning", "lifespan": "off", "timeout_graceful_shutdown": 5}
        server = uvicorn.Server(uvicorn.Config(parts.app, timeout_keep_alive=KEEP_ALIVE_S, **options))
        parts.home.announce(url)
        LOG.info("%s (%s) at %s, home %s", settings.model, parts.clock.version, url, parts.home.path)
        server.run(sockets=[listener])
    return 0


def _leave(*_: object) -> None:
    """Unwind, so that everything is taken apart in order; a second signal does not interrupt that."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise SystemExit(0)


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(2048)  # who reads the address before the loop runs is not refused, but waits
    except OSError as e:
        listener.close()
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port}: {e.strerror or e}",
            "choose another --port (0: any)",
        ) from None
    return listener


if __name__ == "__main__":
    try:
        sys.exit(main(config.load()))
    except SecondnatureError as failure:
        sys.exit(f"{failure.type}: {failure}")
