"""Servers with the weights on a card: vLLM with the plug-in, and the local engine. A lesson, and its undo."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest
from null_gpu import NullGpu
from safetensors.torch import load_file

from secondnature import embedded
from secondnature.records import Correction
from secondnature.weights.content import content_id
from secondnature.wire import Client, JobStatus, TrainRequest

EMBEDDED = Path(embedded.__file__).parent / "weights"
LISTENING = Path(__file__).parents[2] / "examples" / "listening" / "corrections.jsonl"
FOR_VLLM = (
    *("--max-model-len", "512", "--max-num-seqs", "4", "--kv-cache-memory-bytes", "67108864"),
    *("--attention-backend", "TRITON_ATTN", "--gdn-prefill-backend", "triton"),
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def lesson(client: Client) -> JobStatus:
    """Two steps, to the end; where nothing is computed no loss says that all is learned, for it may not."""
    lines = LISTENING.read_text().splitlines()
    request = TrainRequest.model_validate(
        {
            "corrections": [Correction.model_validate_json(line) for line in lines],
            "max_steps": 2,
            "batch_size": 6,
            "learned_loss": 0.0,
            "optimizer": {"lr": 3e-4},
            "lesson": {"behaviour": "listening"},
        }
    )
    job = client.train(request).job
    deadline = time.monotonic() + 240
    while (status := client.status(job)).phase not in ("on trial", "done"):
        assert time.monotonic() < deadline, status
        time.sleep(0.2)
    return status


def taught_and_undone(client: Client, home: Path) -> None:
    """A lesson writes (by copies: see `null/sitecustomize.py`); its undo gives the bytes of before, on the card."""
    before = client.health().weights_version
    assert client.wiring().writes == 0
    status = lesson(client)
    assert (status.state, status.phase) == ("on_trial", "on trial"), status
    assert client.wiring().writes == 2
    during = client.health()
    assert during.trial
    assert during.weights_version != before
    client.cancel(status.job)
    deadline = time.monotonic() + 60
    while client.health().trial:
        assert time.monotonic() < deadline, client.status(status.job)
        time.sleep(0.1)
    health = client.health()
    assert (health.weights_version, health.status) == (before, "ok"), health
    assert client.wiring().writes == 3
    client.checkpoint()  # written from the card's memory
    assert content_id(load_file(home / "model" / "current" / "model.safetensors")) == before


def test_the_local_engine_teaches_and_undoes(null_gpu: NullGpu) -> None:
    port = free_port()
    words = (
        "python3",
        "-m",
        "secondnature.cli",
        "serve",
        "embedded",
        "--device",
        "cuda",
        "--port",
        str(port),
    )
    with null_gpu.server(port, *words) as (client, log):
        wiring = client.wiring()
        assert (wiring.engine, wiring.tensors, wiring.aliased, wiring.problems) == ("local", 108, 108, [])
        assert "weights 0.0 + optimizer state 0.0 + training steps (estimate)" in log.read_text()
        taught_and_undone(client, null_gpu.home)


@pytest.mark.parametrize("graphs", [False, True])
def test_vllm_serves_teaches_and_undoes(null_gpu: NullGpu, graphs: bool) -> None:
    port = free_port()
    words = (
        *("python3", "-m", "secondnature.cli", "serve", "--engine", "vllm", "embedded", "--port", str(port)),
        *([] if graphs else ["--enforce-eager"]),
        *FOR_VLLM,
    )
    with null_gpu.server(port, *words) as (client, log):
        wiring = client.wiring()
        assert (wiring.engine, wiring.tensors, wiring.aliased, wiring.problems) == ("vllm", 84, 84, [])
        assert wiring.cache == "salted"
        assert "84 parameters (8.0 MB) shared where they lie on the GPU" in log.read_text()
        body = {"prompt": "hello", "max_tokens": 4, "temperature": 0}
        answer = client.request("POST", "/v1/completions", body=body)
        assert answer["usage"]["completion_tokens"] == 4
        assert client.health().weights_version in json.dumps(answer)
        taught_and_undone(client, null_gpu.home)


REFUSED: dict[str, tuple[dict[str, str], tuple[str, ...], str]] = {
    "expandable segments": (
        {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        (),
        "expandable segments, which other processes cannot map (unset PYTORCH_CUDA_ALLOC_CONF)",
    ),
    "sleep mode": ({}, ("--enable-sleep-mode",), "sleep mode is on"),
    "cumem": ({}, ("--enable-cumem-allocator",), "the cumem allocator is on"),
    "offloaded weights": ({}, ("--cpu-offload-gb", "1"), "weights are offloaded to host memory"),
    "foreign weights": ({}, ("--load-format", "ipc_cache"), "--load-format ipc_cache"),
    "a layout of its own": (
        {},
        ("--linear-backend", "flashinfer_cutlass"),
        "--linear-backend flashinfer_cutlass",
    ),
    "two ranks": ({}, ("--tensor-parallel-size", "2"), "over 2 processes; expected 1"),
    "too little memory": (
        {},
        ("--kv-cache-memory-bytes", "85000000000"),
        "the GPU's memory does not hold it",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_shared_is_refused_in_one_line(null_gpu: NullGpu, what: str) -> None:
    variables, words, said = REFUSED[what]
    done = null_gpu.run(
        *("python3", "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(EMBEDDED)),
        *("--port", str(free_port()), *words),
        variables={**variables, "SECONDNATURE_HOME": str(null_gpu.home)},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("secondnature: ")]
    assert len(lines) == 1, done.stdout[-3000:]
    assert said in lines[0]
