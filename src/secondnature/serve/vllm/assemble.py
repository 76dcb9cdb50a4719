# pyright: reportMissingImports=false
"""The teaching parts around a running vLLM: home, arena, clock, runner, trainer, routes (vLLM's API server).

Start-up: the home was locked when the configuration was checked. Here the engine's memory is mapped, compared with
the checkpoint that it was loaded from, brought to what the home's log stands for, and only then does vLLM open its
port. At the end a lesson that runs or is on trial is undone, while the memory is still there.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from pathlib import Path
from typing import Any

import torch

from secondnature.config import Settings
from secondnature.engines.stamps import Clock
from secondnature.engines.vllm.client import VllmEngine
from secondnature.engines.vllm.share import Shared, attach
from secondnature.errors import ConfigError, UnsupportedModel, WeightsError
from secondnature.lessons.home import Home
from secondnature.lessons.log import Log
from secondnature.lessons.teaching import Teaching, put_together
from secondnature.lessons.weights import fill_kept
from secondnature.model import chat, load, names, turns
from secondnature.serve.vllm import checks
from secondnature.web.application import application
from secondnature.web.beside_vllm import Door, OwnThread
from secondnature.web.guards import Keys
from secondnature.web.in_band import InBand
from secondnature.web.metrics import register
from secondnature.weights import checkpoint
from secondnature.weights.content import ContentHasher
from secondnature.wire import Wiring

__all__ = ["begin"]

LOG = logging.getLogger("secondnature")
WIRING_TIMEOUT_S = 60.0
ANY_HOST = "0.0.0.0"  # noqa: S104  (vLLM's default; our routes want their key there too)


async def begin(app: Any, client: Any, vllm_config: Any, args: Any) -> None:
    """Put the teaching parts in front of vLLM's application `app`.

    Raises:
        ConfigError, UnsupportedModel, WeightsError, BadCheckpoint, BadDelta: nothing was written.
    """
    from vllm import envs

    found = checks.opened()
    settings = found.settings.model_copy(
        update={
            "host": args.host or ANY_HOST,
            "port": args.port,
            "model": str(vllm_config.model_config.model),
        }
    )
    engine_keys = [str(key) for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    if settings.inference_key is not None and not engine_keys:
        raise ConfigError(
            "a key for completions is set, but vLLM guards them with none", "give vLLM --api-key"
        )
    try:
        manifests = await client.collective_rpc("secondnature_manifest")
    except Exception as e:  # noqa: BLE001  (whatever the worker raised, as text)
        raise WeightsError(
            f"the engine does not know secondnature: {e}",
            "is VLLM_PLUGINS=secondnature set in its environment?",
        ) from None
    if len(manifests) != 1:
        raise UnsupportedModel(
            f"{len(manifests)} workers hold weights; expected 1", "start it with one worker"
        )
    loop = asyncio.get_running_loop()
    name = (args.served_model_name or [vllm_config.model_config.model])[0]
    await asyncio.to_thread(found.home.note_settings, settings)
    teaching, engine = await asyncio.to_thread(
        _teach, manifests[0], settings, found.home, client, vllm_config, args, loop, str(name)
    )
    ours = OwnThread(application(teaching), settings.max_body_bytes)

    async def stop() -> None:
        await asyncio.to_thread(_stop, teaching, ours)

    def on_load(num_requests: int) -> None:
        teaching.arena.load = num_requests
        engine.load_changed()

    host = settings.host if settings.host not in (ANY_HOST, "::") else "127.0.0.1"
    scheme = "https" if args.ssl_certfile else "http"
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{args.port}"
    # vLLM has built its stack by now: the door goes in front of all of it, its authentication included
    app.middleware_stack = Door(
        app.middleware_stack or app.build_middleware_stack(),
        ours=ours,
        clock=teaching.clock,
        memory=teaching.memory,
        keys=Keys(talk=None, correct=teaching.correction_key, teach=teaching.key),
        in_band=InBand(teaching.feedback, teaching.model_name) if settings.in_band else None,
        engine_keys=engine_keys,
        on_load=on_load,
        on_startup=lambda: teaching.home.announce(url),
        on_shutdown=stop,
    )
    register(teaching.runner, teaching.clock)
    teaching.runner.start()
    LOG.info("secondnature: %s serves %s, home %s", name, teaching.clock.version, teaching.home.path)


def _teach(
    manifest: str,
    settings: Settings,
    home: Home,
    client: Any,
    vllm_config: Any,
    args: Any,
    loop: asyncio.AbstractEventLoop,
    model_name: str,
) -> tuple[Teaching, VllmEngine]:
    """Everything but the routes; on a thread, for it reads and hashes all weights."""
    from secondnature.engines.vllm.rendering import read_as_taught, stop_at

    torch.set_num_threads(1)
    shared = attach(manifest)
    arena, directory = shared.arena, shared.directory
    clock, log = _truth(shared, home)
    limit = int(vllm_config.model_config.max_model_len)
    tokenizer = _tokenizer(directory, vllm_config, args)
    vocab_size = load.read_config(directory).get_text_config(decoder=True).vocab_size
    read_as_taught(client, tokenizer)
    stop_at(client, {i for i in chat.end_ids(tokenizer) if i < vocab_size})
    engine = VllmEngine(
        client,
        loop,
        clock,
        vocab_size=vocab_size,
        max_context=limit,
        load=lambda: arena.load,
        priorities=str(vllm_config.scheduler_config.policy) == "priority",
    )
    teaching = put_together(
        settings,
        home=home,
        log=log,
        arena=arena,
        clock=clock,
        directory=directory,
        engine=engine,
        model=load.skeleton(directory),
        tokenizer=tokenizer,
        context_limit=limit,
        layout="vllm",
        model_name=model_name,
        wiring=lambda: _wiring(client, loop, tokenizer),
    )
    home.bind(directory, load.fingerprint(directory), log.base_version, "vllm")
    return teaching, engine


def _tokenizer(directory: Path, vllm_config: Any, args: Any) -> Any:
    """The tokenizer and the chat template that vLLM was told to use: what is taught has to be what is asked."""
    from vllm.renderers.chat_utils import load_chat_template

    given = Path(str(vllm_config.model_config.tokenizer))
    tokenizer = chat.read_tokenizer(given if given.is_dir() else directory)
    turns.note(tokenizer, directory)
    template = load_chat_template(args.chat_template)
    if template is not None:
        tokenizer.chat_template = template
    options = args.default_chat_template_kwargs
    if options:
        tokenizer.apply_chat_template = functools.partial(tokenizer.apply_chat_template, **options)
    for wrong in chat.look(tokenizer):
        LOG.warning("%s: %s", directory, wrong)
    return tokenizer


def _truth(shared: Shared, home: Home) -> tuple[Clock, Log]:
    """Make the engine's weights those that the home's log stands for. Nothing was served yet."""
    arena, directory = shared.arena, shared.directory
    headers = {name: names.Header.of(tensor) for name, tensor in arena.tensors.items()}
    parts = names.plan(directory, headers, device=names.device_of(arena.tensors))
    arena.seen_as(names.views(parts, arena.tensors))
    dtypes = {name: tensor.dtype for name, tensor in arena.tensors.items()}
    hasher = ContentHasher(home.base_version())
    for name, tensor in checkpoint.stream(directory, dtypes):
        hasher.add(name, tensor)
        if not torch.equal(tensor, arena.tensors[name].cpu()):
            raise UnsupportedModel(
                f"{name}: the engine holds other values than {directory}",
                "it changes weights while loading them, and a lesson's undo would not know how",
            )
    version = hasher.id()
    home.check(directory, load.fingerprint(directory), version, "vllm")
    log = Log(home, directory, version, dtypes)
    fill_kept(arena, log)
    return Clock(arena, log.kept_version()), log


def _wiring(client: Any, loop: asyncio.AbstractEventLoop, tokenizer: Any) -> Wiring:
    """What the worker says of the running model. Raises WeightsError: it does not answer."""
    import vllm

    async def ask() -> tuple[str, str]:
        (worker,) = await client.collective_rpc("secondnature_wiring")
        return worker, await client.engine_core.call_utility_async("secondnature_cache")

    try:
        worker, cache = asyncio.run_coroutine_threadsafe(ask(), loop).result(WIRING_TIMEOUT_S)
        found = json.loads(worker)
    except Exception as e:  # noqa: BLE001  (whatever the worker raised, as text)
        raise WeightsError(
            f"the engine does not say what it computes with: {e!r}", "restart the server"
        ) from None
    if cache == "unsalted":
        found["problems"].append("the prefix cache is not salted with the epoch")
    return Wiring.model_validate(
        {
            "engine": "vllm",
            "engine_version": str(vllm.__version__),
            "cache": cache,
            "ends": [e._asdict() for e in turns.endings(tokenizer)],
            **found,
        }
    )


def _stop(teaching: Teaching, ours: OwnThread) -> None:
    """Undo what is open, end the trainer, give the home back."""
    teaching.runner.stop()
    ours.stop()
    teaching.home.close()
