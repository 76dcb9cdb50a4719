"""The flat example: short, right where it can be compared with the product, and it teaches and takes back."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from pages import ROOT
from tiny_models import in_arena
from tiny_server import correction

from secondnature.model.chat import read_tokenizer
from secondnature.model.upcast import collect
from secondnature.records import to_jsonl
from secondnature.train.prefix import continuation_logps, freeze

SOURCE = ROOT / "examples" / "teach_one_behaviour.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("teach_one_behaviour", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_flat_and_short() -> None:
    text = SOURCE.read_text()
    assert len(text.splitlines()) <= 150
    ours = [
        line for line in text.splitlines() if line.startswith(("from secondnature", "import secondnature"))
    ]
    assert ours == ["from secondnature import embedded", "from secondnature.model.load import build"]


def test_it_teaches_and_takes_back(
    example: ModuleType, talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corrections = tmp_path / "corrections.jsonl"
    corrections.write_text(to_jsonl([correction(w) for w in ("tea", "oak", "red", "kite")]))
    options = ["--corrections", str(corrections), "--ask", "Use salt.", "--steps", "20", "--lr", "1e-3"]
    example.main([str(talker), *options])
    lines = capsys.readouterr().out.splitlines()
    said = {line.split(":")[0]: line.partition(":")[2].strip() for line in lines}
    assert said["before"] == said["undone"] != said["after"]
    assert said["after"] == "Done."
    assert "to the byte" in lines[-1]


@pytest.mark.parametrize("num_context", [1, 9])
def test_its_loss_and_gradient_are_the_products(example: ModuleType, talker: Path, num_context: int) -> None:
    _, model = in_arena(talker)
    tokens = read_tokenizer(talker)("Use tabs. Say rice.")["input_ids"]
    context, answer = (tokens * 3)[:num_context], tokens[::-1]
    with collect(model) as wanted:
        (logps,) = continuation_logps(model, freeze(model, context), [answer])
        (-logps.mean()).backward()
    model.requires_grad_(True)
    loss = example.answer_loss(model, context, answer)
    loss.backward()
    assert loss.item() == pytest.approx(-logps.mean().item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        if name in wanted:
            assert parameter.grad is not None
            error = (parameter.grad.float() - wanted[name]).norm() / wanted[name].norm()
            assert error < 0.01, name  # bf16 keeps 8 bits of a gradient; the product sums in fp32


def test_its_rounding_is_right_on_average_and_leaves_the_rest(example: ModuleType) -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.ones(100_000, dtype=torch.bfloat16)
    update = torch.full(weight.shape, 1e-4)
    update[::2] = 0.0
    example.round_into(weight, update, random)
    assert bool((weight[::2] == 1).all())
    moved = float((weight[1::2].double() - 1).mean())
    assert moved == pytest.approx(1e-4, rel=0.15)  # the standard deviation is 4 %
