"""`serve --engine vllm`: the command line and the environment that vLLM gets, and what is refused before it starts.

vLLM itself is not started here; it need not be installed.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from fake_server import Fake
from tiny_gguf import write

from secondnature import config
from secondnature.cli import connect, machine, main, vllm
from secondnature.cli.output import Output
from secondnature.errors import ConfigError, Unreachable

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", vllm.LAUNCHER]


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What the process would become: `words`, `environ`."""
    for name in [n for n in os.environ if n.startswith(("SECONDNATURE_", "VLLM_"))]:
        monkeypatch.delenv(name)
    found: dict[str, Any] = {}

    def execve(path: str, words: list[str], environ: dict[str, str]) -> None:
        found.update(words=words, environ=environ)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(vllm, "installed", lambda: f"{vllm.SUPPORTED}.0+cpu")
    monkeypatch.chdir(tmp_path)
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def test_vllms_own_options_pass_through_untouched(
    executed: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    words = ["serve", "--engine", "vllm", str(model), "--max-model-len", "2048", "-O0", "--home", str(home)]
    words += [
        "--enforce-eager",
        "--port",
        "0",
        "--hf-overrides={}",
        "--share",
        "0.25",
        "--train-threads",
        "3",
    ]
    assert main([*words, "--generation-config", "vllm"]) == 0
    port = executed["words"][6]
    assert int(port) > 0, "vLLM takes no 0"
    assert executed["words"] == [
        *LAUNCH,
        *("--model", str(model), "--port", port, "--host", "127.0.0.1"),
        *("--max-model-len", "2048", "-O0", "--enforce-eager", "--hf-overrides={}"),
        *("--generation-config", "vllm"),
    ]
    environ = executed["environ"]
    assert environ["VLLM_PLUGINS"] == "secondnature"
    assert environ["SECONDNATURE_HOME"] == str(home)
    assert (environ["SECONDNATURE_SHARE"], environ["SECONDNATURE_TRAIN_THREADS"]) == ("0.25", "3")
    assert (environ["VLLM_CPU_KVCACHE_SPACE"], environ["HF_HUB_OFFLINE"]) == ("1", "1")
    assert "VLLM_API_KEY" not in environ
    assert environ["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    "words",
    [
        ["embedded", "--foo"],
        ["--model", "embedded", "--foo"],
        ["--foo", "--model", "embedded"],
        ["--model=embedded", "embedded", "--foo"],
    ],
)
def test_the_model_comes_first_or_by_its_option(words: list[str], executed: dict[str, Any]) -> None:
    assert main(["serve", *words, "--port", "0", "--engine", "vllm"]) == 0
    found = executed["words"]
    assert Path(found[found.index("--model") + 1]).parts[-2:] == ("embedded", "weights")
    assert found[-3:] == ["--served-model-name", "embedded", "--foo"]


def test_a_gguf_file_is_served_by_its_directory(
    executed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write(tmp_path / "tiny.gguf")
    assert main(["serve", "--engine", "vllm", str(file), "--port", "0"]) == 0
    directory = Path(executed["words"][executed["words"].index("--model") + 1])
    assert directory.is_relative_to(tmp_path / "cache")
    assert {"config.json", "tokenizer.json"} < {f.name for f in directory.iterdir()}


def test_what_the_user_says_wins(
    executed: dict[str, Any], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("VLLM_PLUGINS", "lora_resolver"), ("HF_HUB_OFFLINE", "0"), ("VLLM_API_KEY", "k")):
        monkeypatch.setenv(name, value)
    given = ["--host=0.0.0.0", "--served_model_name", "mine", "--kv-cache-memory-bytes", "2G"]
    assert main(["serve", "--engine", "vllm", "embedded", "--port", "0", *given]) == 0
    assert executed["words"][7:] == ["--host", "0.0.0.0", *given[1:]]
    environ = executed["environ"]
    assert environ["VLLM_PLUGINS"] == "lora_resolver,secondnature"
    assert environ["HF_HUB_OFFLINE"] == "0"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environ
    monkeypatch.setenv("VLLM_PLUGINS", "secondnature,lora_resolver")
    assert main(["serve", "--engine", "vllm", "embedded", "--port", "0"]) == 0
    assert executed["environ"]["VLLM_PLUGINS"] == "secondnature,lora_resolver"


def test_a_key_for_completions_becomes_vllms(
    executed: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["serve", "--engine", "vllm", "embedded", "--port", "0"]
    monkeypatch.setenv("SECONDNATURE_INFERENCE_KEY", "a-guest-of-sixteen")
    assert main(words) == 0
    assert executed["environ"]["VLLM_API_KEY"] == "a-guest-of-sixteen"
    assert "a-guest-of-sixteen" not in " ".join(executed["words"])
    assert main([*words, "--api-key", "mine"]) == 0
    assert "VLLM_API_KEY" not in executed["environ"]
    monkeypatch.setenv("VLLM_API_KEY", "another")
    executed.clear()
    assert main(words) == 64
    assert "two keys for completions" in capsys.readouterr().err
    assert executed == {}


def refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["serve", "--engine", "vllm", *words]) == 64
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 2
    return err


def test_what_can_be_known_to_be_wrong_is_said_before_vllm_starts(
    executed: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused([str(tmp_path / "none")], "none: no model there (no config.json)", capsys)
    refused(["embedded", "--model", "other"], "two models: embedded and --model other", capsys)
    refused(["embedded", "--share", "2"], "`share` (flag)", capsys)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(["embedded", "--port", str(port)], f"cannot listen on 127.0.0.1:{port}", capsys)
    monkeypatch.setattr(vllm, "installed", lambda: "0.33.1")
    err = refused(["embedded"], "vLLM is 0.33.1; expected 0.32.x", capsys)
    monkeypatch.setattr(vllm, "installed", lambda: None)
    err = refused(["embedded"], "vLLM is not installed", capsys)
    assert "pip install 'secondnature[vllm]'" in err
    assert executed == {}


def test_installed_asks_for_either_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def known(*names: str) -> Callable[[str], str]:
        def version(name: str) -> str:
            if name not in names:
                raise metadata.PackageNotFoundError(name)
            return f"{name} 1"

        return version

    for names, expected in ((("vllm",), "vllm 1"), (("vllm-cpu",), "vllm-cpu 1"), ((), None)):
        monkeypatch.setattr(metadata, "version", known(*names))
        assert vllm.installed() == expected


def test_there_is_one_supported_version() -> None:
    from secondnature.serve.vllm import general

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (pinned,) = [p for p in extras["vllm"] if p.startswith("vllm-cpu==")]
    assert vllm.SUPPORTED == general.SUPPORTED
    assert vllm.PLUGIN == general.NAME
    assert vllm.supported(pinned.removeprefix("vllm-cpu=="))
    assert "torch==2.13.0\n" in (ROOT / "constraints.txt").read_text()
    assert "torch==2.13.0 " in vllm.RECIPE


def test_doctor_looks_at_the_vllm_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}
    monkeypatch.setattr(machine, "_installed", beside.get)

    def found(version: str | None) -> list[tuple[str, str]]:
        monkeypatch.setattr(vllm, "installed", lambda: version)
        return [(f.level, f.hint) for f in machine._vllm()]  # pyright: ignore[reportPrivateUsage]

    assert found(None) == []
    assert found("0.33.0") == [("fail", vllm.RECIPE)]
    assert found("0.32.0") == [("warn", "pip uninstall torchvision")]
    beside["torch"] = "2.13.0"
    assert found("0.32.0+cpu") == [("ok", "")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["embedded", "extra"], "Got unexpected extra argument extra"),
        (["--prot", "3"], "No such option: --prot"),
        (["embedded", "--max-model-len", "3"], "No such option: --max-model-len"),
    ],
)
def test_the_local_engine_takes_none_of_them(
    words: list[str], said: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--home", str(home), *words]) == 64
    assert said in capsys.readouterr().err


def test_a_home_is_served_by_the_engine_it_was_served_by(
    executed: dict[str, Any], tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "home.json").write_text(json.dumps({"model": str(model), "engine": "vllm"}))
    assert main(["serve", "--home", str(home), "--port", "0"]) == 0
    assert executed["words"][3:5] == ["--model", str(model)]
    (home / "home.json").write_text(json.dumps({"model": str(model)}))
    assert connect.home_engine(config.load({"home": home}, environ={})) == "local"


def test_a_command_starts_vllm_again_and_says_why_it_did_not_start(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "server.json").unlink()
    (home / "home.json").write_text(json.dumps({"model": "gone", "engine": "vllm"}))
    started: list[list[str]] = []
    popen = subprocess.Popen
    log = (
        "noise\nsecondnature: ConfigError: LoRA adapters are enabled (leave --enable-lora out)\nmore noise\n"
    )

    def start(command: list[str], **options: Any) -> Any:
        started.append(command)
        return popen([sys.executable, "-c", f"print({log!r}); raise SystemExit(1)"], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    assert main(["lessons", "log", "--home", str(home)]) == 69
    (command,) = started
    assert command[command.index("--engine") + 1] == "vllm"
    assert command[command.index("--port") + 1] == "0"
    err = capsys.readouterr().err
    assert "starting vLLM, which takes a while, on" in err
    assert "did not start: ConfigError: LoRA adapters are enabled" in err
    assert "noise" not in err


def test_a_slow_start_says_that_it_goes_on(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(connect, "SAY_EVERY_S", 0.0)
    (home / "server.log").write_text("")
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3)"])
    with pytest.raises(Unreachable, match="did not start: exit code 0"):
        connect._await_start(process, home, Output(), "vllm")  # pyright: ignore[reportPrivateUsage]
    assert "still starting" in capsys.readouterr().err


def test_the_last_value_of_an_option_counts() -> None:
    words = ["--host", "a", "--host=b", "--api_key", "--other", "--x=1=2"]
    assert vllm.option(words, "--host") == "b"
    assert vllm.option(words, "--api-key") == ""
    assert vllm.option(words, "--x") == "1=2"
    assert vllm.option(words, "--port") is None


def test_an_ipv6_port_is_looked_at_too() -> None:
    with pytest.raises(ConfigError, match="cannot listen on 2001:db8::1:1"):
        vllm._free_port("2001:db8::1", 1)  # pyright: ignore[reportPrivateUsage]
