"""From what the user said to a model that is served, or refused with the home as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_models import dense_config, save_tiny
from tiny_server import save_tokenizer

from secondnature.config import Settings
from secondnature.errors import ConfigError, UnsupportedModel
from secondnature.serve.local import assemble
from secondnature.serve.place import model_directory, model_name


def settings(model: Path | str, home: Path) -> Settings:
    return Settings.model_validate({"model": str(model), "home": home, "port": 0})


def test_a_refused_model_leaves_the_home_to_others(tmp_path: Path) -> None:
    """Also one that fails as late as a model can: when it is tried."""
    good = save_tiny(dense_config(vocab_size=320), tmp_path / "good")
    save_tokenizer(good)
    bad = Path(shutil.copytree(good, tmp_path / "bad"))
    (bad / "config.json").write_text(
        json.dumps(json.loads((good / "config.json").read_text()) | {"max_position_embeddings": 3})
    )
    home = tmp_path / "home"
    with pytest.raises(UnsupportedModel, match="reads only 3 tokens"), assemble(settings(bad, home)):
        pass
    assert not (home / "home.json").exists()
    with assemble(settings(good, home)):
        assert json.loads((home / "home.json").read_text())["model"] == str(good)


def test_what_is_no_model_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        model_directory(settings("Qwen/Qwen3-0.6B", tmp_path))
    assert "hf download Qwen/Qwen3-0.6B" in caught.value.hint
    (tmp_path / "models--org--name" / "snapshots").mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        model_directory(settings(tmp_path / "models--org--name", tmp_path))
    assert "below snapshots/" in caught.value.hint
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ConfigError) as caught:
        model_directory(settings(tmp_path / "adapter", tmp_path))
    assert "an adapter of org/base: merge it" in caught.value.hint


def test_a_model_in_a_hubs_cache_has_its_own_name(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--tiny-llama" / "snapshots" / "0123abcd"
    assert model_name(settings(snapshot, tmp_path), snapshot) == "org/tiny-llama"
    assert model_name(settings("embedded", tmp_path), snapshot) == "embedded"
    assert model_name(settings(tmp_path / "mine", tmp_path), tmp_path / "mine") == "mine"
