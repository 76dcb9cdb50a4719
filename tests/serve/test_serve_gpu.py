"""On a GPU: what its memory goes to is planned before anything is loaded, and what cannot be shared is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import hybrid_config, read_weights, save_tiny

from secondnature.config import Settings
from secondnature.errors import ConfigError, WeightsError
from secondnature.model.load import skeleton
from secondnature.records import Example, OptimizerSettings
from secondnature.serve import gpu, local
from secondnature.serve.vllm import card
from secondnature.train.apollo import Apollo, state_bytes
from secondnature.train.step import train_step

GB = 10**9


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save_tiny(hybrid_config(), tmp_path / "model")


def test_the_optimizers_state_is_what_a_lesson_leaves(directory: Path) -> None:
    from secondnature.model.load import build

    model = build(directory, read_weights(directory))
    optimizer = Apollo(model, OptimizerSettings(lr=1e-3, rank=8), track=False)
    example = Example(context_ids=[3, 4, 5], continuation_ids=[6, 7, 8])
    train_step(model, optimizer, [example], learned_loss=0.0)
    tensors = optimizer.state_dict()[0]
    held = sum(t.nbytes for n, t in tensors.items() if n.endswith((":m", ":v")) and "embed" not in n)
    planned = state_bytes(skeleton(directory), 8)
    embedding = sum(t.nbytes for n, t in tensors.items() if n.endswith((":m", ":v")) and "embed" in n)
    assert planned in (held, held + embedding), "but for rows of an untied embedding"


def test_the_sums_are_said_and_what_is_left_is_for_keys_and_values(directory: Path) -> None:
    found = gpu.budget(directory, free=80 * GB, total=85 * GB, num_processes=3, engine=2 * GB)
    weights = sum(t.numel() * 2 for t in read_weights(directory).values())
    assert found.weights == weights
    assert found.left == 80 * GB - found.taken
    assert found.taken == weights + found.state + found.working + 3 * gpu.CONTEXT_BYTES + 2 * GB
    assert "contexts (estimate) 1.6 + engine (estimate) 2.0 + keys and values 75." in str(found)
    assert str(found).endswith("= 80.0 GB; 80.0 of 85.0 GB are free")
    found.check()


@pytest.mark.parametrize(("free", "keys"), [(3 * GB, None), (6 * GB, 5 * GB)])
def test_what_does_not_fit_is_refused_with_the_sums(directory: Path, free: int, keys: int | None) -> None:
    found = gpu.budget(directory, free=free, total=85 * GB, num_processes=3, engine=2 * GB, keys=keys)
    with pytest.raises(WeightsError, match=r"does not hold it: weights .* of 85\.0 GB are free"):
        found.check()


def arguments(**given: Any) -> SimpleNamespace:
    plain: dict[str, Any] = {
        "enable_cumem_allocator": False,
        "load_format": "auto",
        "cpu_offload_gb": 0,
        "offload_group_size": 0,
        "offload_backend": "auto",
        "enable_eplb": False,
        "linear_backend": "auto",
    }
    return SimpleNamespace(**{**plain, **given})


@pytest.mark.parametrize(
    ("given", "environ", "found"),
    [
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "expandable segments"),
        ({}, {"PYTORCH_ALLOC_CONF": "backend:native,expandable_segments:true"}, "expandable segments"),
        ({"enable_cumem_allocator": True}, {}, "cumem"),
        ({"load_format": "ipc_cache"}, {}, "--load-format ipc_cache"),
        ({"cpu_offload_gb": 1.5}, {}, "offloaded"),
        ({"offload_group_size": 8}, {}, "offloaded"),
        ({"offload_backend": "uva"}, {}, "offloaded"),
        ({"enable_eplb": True}, {}, "experts"),
        ({"linear_backend": "flashinfer_trtllm"}, {}, "--linear-backend flashinfer_trtllm"),
        ({}, {"CUDA_VISIBLE_DEVICES": "MIG-8f1bd0e2"}, "MIG"),
    ],
)
def test_each_option_that_would_keep_weights_elsewhere_is_refused(
    given: dict[str, Any], environ: dict[str, str], found: str
) -> None:
    said = [what for wrong, what, hint in card.refusals(arguments(**given), environ) if wrong and hint]
    assert len(said) == 1
    assert found in said[0]


def test_what_vllm_does_by_itself_is_not_refused() -> None:
    plain = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128", "CUDA_VISIBLE_DEVICES": "1"}
    assert not any(wrong for wrong, _, _ in card.refusals(arguments(), plain))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_before_anything_is_read(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", device="cuda")
    with pytest.raises(ConfigError, match="no GPU is seen"), local.assemble(settings):
        pass
