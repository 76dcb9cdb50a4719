"""The engine computes in the dtype that was set; lessons and stamps are those of fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from secondnature import embedded
from secondnature.config import Settings
from secondnature.engines.generation import GenerationRequest, score_request
from secondnature.model.chat import read_tokenizer
from secondnature.model.load import build
from secondnature.model.upcast import compute_dtype
from secondnature.serve.local import assemble

TEXT = "Paint the door red. Yes, I will paint the door red."


@pytest.mark.parametrize(("said", "wanted"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_answers_are_computed_in_it(said: str, wanted: torch.dtype, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, port=0, compute_dtype=said)  # pyright: ignore[reportArgumentType]
    with assemble(settings) as parts:
        engine = parts.engine
        assert compute_dtype(engine._turns._model)  # pyright: ignore[reportPrivateUsage] == wanted
        ids = read_tokenizer(Path(embedded.path())).encode(TEXT)
        asked = [score_request(ids[:3], ids[3:]), *[GenerationRequest(ids[:n], max_tokens=4) for n in (3, 9)]]
        alone, *_ = engine.generate(asked[:1])
        together, *_ = engine.generate(asked)
        wide = build(Path(embedded.path()), parts.arena.tensors, compute_dtype=torch.float32)
        with torch.inference_mode():
            logits = wide(input_ids=torch.tensor([ids]), use_cache=False).logits[0, 2:-1]
        exact = logits.log_softmax(-1).gather(1, torch.tensor(ids[3:]).unsqueeze(1)).squeeze(1)
        assert all(t.dtype == torch.bfloat16 for t in parts.arena.tensors.values()), (
            "the weights are as stored"
        )
    for result in (alone, together):
        found = torch.tensor([t.logprob for t in result.prompt_tokens])
        near = (found - exact).abs().max().item()
        assert near < (1e-4 if wanted == torch.float32 else 0.15)
        if wanted == torch.bfloat16:
            assert near > 1e-4, "it was rounded"
        assert result.weights is not None
        assert not result.weights.changed
