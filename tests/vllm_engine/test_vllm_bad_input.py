# pyright: reportMissingImports=false
"""What cannot be served and trained ends vLLM before weights are loaded, in one line that says what to do."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import dense_config, gpt2_config, hybrid_config, save_tiny
from vllm_server import EMBEDDED, Server, environment

from secondnature.serve.vllm import checks, general


def dense(path: Path, **edited: Any) -> Path:
    """A dense model that can be served and trained, but for what is edited in its config.json."""
    directory = save_tiny(dense_config(head_dim=32), path)
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **edited}))
    return directory


def quantised(method: str) -> Callable[[Path], Path]:
    return lambda path: dense(path, quantization_config={"quant_method": method, "bits": 4, "group_size": 64})


def pickled(path: Path) -> Path:
    directory = dense(path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    return directory


def empty(path: Path) -> Path:
    path.mkdir()
    return path


def no_numbers(path: Path) -> Path:
    return dense(path, architectures=["NobodyForCausalLM"], model_type="nobody")


REFUSED: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "gptq": (quantised("gptq"), {}, r"UnsupportedModel: .* quantised \(gptq\); expected plain bfloat16"),
    "bnb": (
        quantised("bitsandbytes"),
        {},
        r"quantised \(bitsandbytes\).* \(serve the model as it was before",
    ),
    "unheard-of": (quantised("mystery"), {}, r"quantised \(mystery\)"),
    "quantised at load": (dense, {"quantization": "fp8"}, r"quantised \(fp8\)"),
    "two ranks": (dense, {"tensor_parallel_size": 2}, r"over 2 processes.*--tensor-parallel-size 1"),
    "two stages": (dense, {"pipeline_parallel_size": 2}, r"over 2 processes.*--pipeline-parallel-size 1"),
    "two replicas": (dense, {"data_parallel_size": 2}, r"over 2 processes; expected 1"),
    "gpt-2": (lambda p: save_tiny(gpt2_config(), p), {}, r"GPT2LMHeadModel; expected one of .*local engine"),
    "nobody's": (
        lambda p: dense(p, architectures=["NobodyForCausalLM"]),
        {},
        r"is NobodyForCausalLM; expected",
    ),
    "nobody's type": (no_numbers, {}, r"UnsupportedModel: .*knows no model_type 'nobody'"),
    "float32 hybrid": (lambda _: EMBEDDED, {"dtype": "float32"}, r"are float32; .*--dtype bfloat16"),
    "float16": (
        dense,
        {"dtype": "float16"},
        r"are float16; expected bfloat16 or float32 \(start it with --dtype",
    ),
    "delta heads": (
        lambda p: save_tiny(hybrid_config(head_dim=32), p),
        {},
        r"linear_key_head_dim 16.*both 128",
    ),
    "attention heads": (lambda p: save_tiny(dense_config(), p), {}, r"heads are 16 wide; .*one of 32, 64"),
    "queries per key": (
        lambda p: save_tiny(dense_config(head_dim=32, num_attention_heads=18, num_key_value_heads=1), p),
        {},
        r"18 heads of queries share one of keys; .*16 at most",
    ),
    "adapters": (dense, {"enable_lora": True}, r"ConfigError: .*LoRA .*\(leave --enable-lora out\)"),
    "speculative": (
        dense,
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        r"speculative decoding is on \(leave --speculative-config out\)",
    ),
    "sleep": (dense, {"enable_sleep_mode": True}, r"sleep mode is on.*--enable-sleep-mode"),
    "transformers": (dense, {"model_impl": "transformers"}, r"--model-impl transformers is set"),
    "pooling": (dense, {"runner": "pooling"}, r"run for pooling; .*\(leave --runner out\)"),
    "offloaded": (dense, {"kv_offloading_size": 1}, r"kept outside the engine.*--kv-offloading-size out"),
    "transfer": (dense, {"weight_transfer_config": {"backend": "nccl"}}, r"--weight-transfer-config out"),
    "pickled": (pickled, {}, r"BadCheckpoint: .*no safetensors.*pickled weights .*save_pretrained"),
    "nothing": (empty, {}, r"BadCheckpoint: .*config\.json"),
}


def configure(model: Path, *, serving: bool = False, processes: int = 1, **options: Any) -> Any:
    """vLLM's configuration, as its API server (`serving`) or somebody else makes it."""
    from vllm import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    arguments = AsyncEngineArgs(
        model=str(model), **{"skip_tokenizer_init": True, "enforce_eager": True, **options}
    )
    arguments._api_process_count = processes
    context = UsageContext.OPENAI_API_SERVER if serving else UsageContext.LLM_CLASS
    return arguments.create_engine_config(usage_context=context)


def refused(model: Path, **options: Any) -> str:
    """The one line that vLLM ends with."""
    with pytest.raises(SystemExit) as caught:
        configure(model, **options)
    line = str(caught.value)
    assert line.startswith("secondnature: ")
    assert line.endswith(")")  # the hint
    return line


def test_a_model_that_fits_is_accepted(tmp_path: Path) -> None:
    for model in (dense(tmp_path / "m"), EMBEDDED):
        assert configure(model).model_config.model == str(model)


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    make, options, message = REFUSED[case]
    assert re.search(message, line := refused(make(tmp_path / "m"), **options)), line


def test_development_mode_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    assert "unset VLLM_SERVER_DEV_MODE" in refused(dense(tmp_path / "m"))


def test_too_little_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_free_bytes", lambda: 100_000)
    line = refused(dense(tmp_path / "m"))
    assert "WeightsError" in line
    assert "100,000 bytes of memory are free" in line
    assert "raise the container's limit" in line


def test_an_api_server_that_is_not_alone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECONDNATURE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(checks, "_OPENED", [])
    line = refused(dense(tmp_path / "m"), serving=True, processes=2)
    assert "2 API servers share the engine" in line
    assert "--api-server-count 1" in line
    assert not (tmp_path / "home").exists()


def test_a_setting_that_nobody_knows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECONDNATURE_HOMES", str(tmp_path))
    monkeypatch.setattr(checks, "_OPENED", [])
    assert "did you mean `home`?" in refused(dense(tmp_path / "m"), serving=True)


def test_another_version_of_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    general.check_version()
    for version, fits in (("0.32.7", True), ("0.32.0+cpu", True), ("0.33.0", False), ("1.32.0", False)):
        monkeypatch.setattr(vllm, "__version__", version)
        if fits:
            general.check_version()
        else:
            with pytest.raises(SystemExit, match=rf"vLLM is {version}; expected 0\.32\.x.*VLLM_PLUGINS"):
                general.check_version()


DISABLED = """
import json, sys
from vllm import AsyncEngineArgs
from vllm.plugins import load_endpoint_plugins
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.worker.gpu_worker import Worker
made = AsyncEngineArgs(model=sys.argv[1], skip_tokenizer_init=True, enable_lora=True).create_engine_config()
print(json.dumps({
    "lora": made.lora_config is not None,
    "routes": len(load_endpoint_plugins(("generate",))),
    "changed": [hasattr(AsyncEngineArgs, "secondnature"), hasattr(KVCacheManager, "secondnature"),
                hasattr(Worker, "secondnature_manifest"), "secondnature.engines.vllm.packing" in sys.modules],
}))
"""


def test_vllm_is_itself_where_the_plug_in_is_not_asked_for(tmp_path: Path) -> None:
    variables = environment()
    variables.pop("VLLM_PLUGINS")
    command = [sys.executable, "-c", DISABLED, str(dense(tmp_path / "m"))]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"lora": True, "routes": 0, "changed": [False] * 4}


@pytest.mark.parametrize("names", [None, "", "another", "secondnature-x"])
def test_vllm_says_how_the_plug_in_is_enabled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, names: str | None
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS")
    if names is not None:
        monkeypatch.setenv("VLLM_PLUGINS", names)
    monkeypatch.setattr(logging.getLogger("secondnature"), "propagate", True)
    with caplog.at_level(logging.INFO, "secondnature"):
        general.register()
    assert "VLLM_PLUGINS=secondnature" in caplog.text


def test_a_server_that_is_refused_says_so_in_its_last_line(tmp_path: Path) -> None:
    begun = time.monotonic()
    server = Server(tmp_path / "home", model=quantised("gptq")(tmp_path / "m"))
    try:
        assert server.process.wait(120) == 1
        lines = server.output().strip().splitlines()
        assert lines[-1].startswith("secondnature: UnsupportedModel: ")
        assert "Traceback" not in server.output()
        assert "Loading" not in server.output()
        assert not (tmp_path / "home").exists()
        print(f"refused after {time.monotonic() - begun:.1f} s")
    finally:
        server.__exit__()
