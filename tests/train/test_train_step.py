"""A whole step: it learns, brackets its writes, repeats to the bit, and writes nothing where it must not."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, VOCAB_SIZE, gpt2_config, hybrid_config, in_arena, save_tiny
from torch import Tensor, nn

from secondnature.errors import BadExample, ContextOverflow, Exploded, NonFinite
from secondnature.model.gradients import Gradient, dense
from secondnature.records import Example, OptimizerSettings
from secondnature.train.apollo import Apollo
from secondnature.train.guard import Bounds, check_tensors
from secondnature.train.losses import Reference
from secondnature.train.step import log_probs, references, train_step
from secondnature.weights.arena import Arena

SETTINGS = OptimizerSettings(lr=2e-3, rank=8)

GOLDEN = [4.561915556589763, 3.8443426291147866, 3.350855588912964]


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(2, VOCAB_SIZE), k=count)


def batch() -> list[Example]:
    """Three pairs with contexts of 20 to 70 tokens."""
    lengths = [(20, 8, 5), (70, 3, 9), (33, 12, 12)]
    return [
        Example(context_ids=tokens(c, c), continuation_ids=tokens(t, t), rejected_ids=tokens(r, 100 + r))
        for c, t, r in lengths
    ]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(hybrid_config(), tmp_path_factory.mktemp("hybrid"))


@pytest.fixture
def hybrid(directory: Path) -> tuple[Arena, nn.Module]:
    return in_arena(directory)


def copies(arena: Arena) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in arena.tensors.items()}


def same(arena: Arena, before: dict[str, Tensor]) -> bool:
    return all(
        torch.equal(t.view(torch.int16), before[n].view(torch.int16)) for n, t in arena.tensors.items()
    )


def test_golden_losses(hybrid: tuple[Arena, nn.Module]) -> None:
    """Three ORPO steps, at full digits.

    Exact equality holds on one machine only: other processors add in another order, and a rounding that falls the
    other way is then learned from. The same steps computed in fp64 differ by 9e-6 at most, without oneDNN by
    1.2e-5; another rounding seed by 2e-2. Hence 3e-5, and no more than three steps.
    """
    arena, model = hybrid
    optimizer = Apollo(model, SETTINGS, seed=1)
    losses = [train_step(model, optimizer, batch(), "orpo", writing=arena.writing).loss for _ in range(3)]
    assert losses == pytest.approx(GOLDEN, rel=3e-5)


def test_the_same_seed_gives_the_same_bits(directory: Path) -> None:
    runs = []
    for _ in range(2):
        arena, model = in_arena(directory)
        optimizer = Apollo(model, SETTINGS, seed=4)
        for _ in range(3):
            train_step(model, optimizer, batch(), "sft", writing=arena.writing)
        runs.append(copies(arena))
    assert all(torch.equal(t, runs[1][n]) for n, t in runs[0].items())


@pytest.mark.parametrize("objective", ["sft", "orpo", "dpo", "dpop"])
def test_each_objective_learns_what_it_says(hybrid: tuple[Arena, nn.Module], objective: Any) -> None:
    arena, model = hybrid
    examples = batch()
    before = margins(model, examples)
    reference = references(model, examples)
    optimizer = Apollo(model, SETTINGS)
    results = [
        train_step(model, optimizer, examples, objective, writing=arena.writing, references=reference)
        for _ in range(5)
    ]
    assert results[-1].loss < results[0].loss
    after = margins(model, examples)
    assert all(b > a + 1 for a, b in zip(before, after, strict=True))
    if objective == "sft":
        assert results[0].margins == (None, None, None)
        assert results[0].num_tokens == 23
    else:
        assert results[0].margins == pytest.approx(before, rel=1e-5)
        assert results[0].num_tokens == 49
    if objective in ("dpo", "dpop"):
        assert results[0].loss == pytest.approx(math.log(2), rel=1e-5), "nothing has moved yet"


def margins(model: nn.Module, examples: Sequence[Example]) -> list[float]:
    found = []
    for e in examples:
        assert e.rejected_ids is not None
        chosen, rejected = log_probs(model, e.context_ids, [e.continuation_ids, e.rejected_ids])
        found.append(chosen - rejected)
    return found


def test_all_writes_of_a_step_lie_within_one_bracket(hybrid: tuple[Arena, nn.Module]) -> None:
    arena, model = hybrid
    before = copies(arena)
    brackets = []

    @contextlib.contextmanager
    def writing() -> Iterator[None]:
        brackets.append(same(arena, before))
        yield
        brackets.append(same(arena, before))
        before.update(copies(arena))

    train_step(model, Apollo(model, SETTINGS), batch(), writing=writing)
    assert brackets == [True, False]
    assert same(arena, before)


def test_learned_examples_give_no_gradient_and_no_write(hybrid: tuple[Arena, nn.Module]) -> None:
    """A gradient of 1e-4 would still take a full-size step."""
    arena, model = hybrid
    before = copies(arena)
    optimizer = Apollo(model, SETTINGS)
    result = train_step(model, optimizer, batch(), writing=arena.writing, learned_loss=100)
    assert (result.wrote, result.num_learned, result.grad_norm) == (False, 3, 0.0)
    assert same(arena, before)
    assert arena.writes == (0, 0)
    assert optimizer.steps == 0
    some = sorted(result.losses)[1]
    assert train_step(model, optimizer, batch(), writing=arena.writing, learned_loss=some).num_learned == 1


def test_an_example_that_is_learned_but_above_the_threshold_takes_a_small_step(
    hybrid: tuple[Arena, nn.Module],
) -> None:
    """Ordinary steps, and one whose gradient is 1e-4 of theirs: no matrix moves a tenth as far."""
    arena, model = hybrid
    optimizer = Apollo(model, SETTINGS)
    lengths: list[dict[str, float]] = []
    norm = 0.0
    for step in range(5):
        before = {n: t.clone() for n, t in (optimizer.task_vector or {}).items()}
        limit = 1e-4 * norm if step == 3 else None
        norm = train_step(
            model, optimizer, batch(), writing=arena.writing, max_grad_norm=limit, learned_loss=0
        ).grad_norm
        after = optimizer.task_vector or {}
        lengths.append({n: float((t - before.get(n, 0.0)).norm()) for n, t in after.items()})
    for name, rule in optimizer.rules.items():
        if rule == "apollo":
            assert lengths[3][name] < 0.1 * lengths[2][name], name
            assert lengths[4][name] > 0.5 * lengths[2][name], name


class Recording(Apollo):
    """The product's optimizer, which also keeps the gradients that it was given."""

    seen: dict[str, Tensor]

    def step(self, gradients: Mapping[str, Gradient], **options: Any) -> None:
        self.seen = {name: dense(gradient).clone() for name, gradient in gradients.items()}
        super().step(gradients, **options)


def variants() -> list[Example]:
    """Two contexts, interleaved: three pairs and a plain answer to one, two pairs to the other."""
    first, second = tokens(50, 1), tokens(30, 2)
    rows = [(first, 12, 5), (second, 4, 9), (first, 1, 1), (first, 20, None), (second, 7, 7), (first, 3, 15)]
    return [
        Example(
            context_ids=c,
            continuation_ids=tokens(t, 10 + i),
            rejected_ids=None if r is None else tokens(r, 20 + i),
            weight=1 + i / 4,
        )
        for i, (c, t, r) in enumerate(rows)
    ]


def off_the_kink(found: list[Reference | None]) -> list[Reference | None]:
    """As if the chosen answers had risen or fallen by half a nat: where neither is true, rounding alone says
    whether DPOP's penalty, fifty times the rest, is in the gradient."""
    return [r and replace(r, chosen=r.chosen + (0.5, -0.5)[i % 2]) for i, r in enumerate(found)]


@pytest.mark.parametrize("objective", ["sft", "orpo", "dpop"])
def test_together_equals_one_by_one(directory: Path, objective: Any) -> None:
    """All answers to a context in one forward, or each example in its own: 1e-6 of the loss, 3e-6 of the gradient.

    What is known of each example comes back in the order of the batch, also from the references.
    """
    examples = variants()
    widths: list[int] = []
    runs = []
    for max_tokens, max_bytes in ((512, 2**30), (50, 2**30), (1, 2**30), (512, 0)):
        arena, model = in_arena(directory)
        reference = references(model, examples)
        optimizer = Recording(model, SETTINGS)
        model.get_submodule("model.layers.0").register_forward_pre_hook(
            lambda module, args: widths.append(len(args[0])) if torch.is_grad_enabled() else None
        )
        result = train_step(
            model,
            optimizer,
            examples,
            objective,
            writing=arena.writing,
            references=off_the_kink(reference),
            max_tokens=max_tokens,
            max_bytes=max_bytes,
        )
        runs.append((result, optimizer.seen, reference, list(widths)))
        widths.clear()
    many = objective != "sft"
    assert [run[3] for run in runs] == (
        [[7, 4], [4, 2, 1, 4], [2, 2, 2, 1, 2, 2], [2, 2, 2, 1, 2, 2]]
        if many
        else [[4, 2], [3, 1, 2], [1] * 6, [1] * 6]
    )
    alone, gradients, reference, _ = runs[2]
    scale = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    tolerance = 3e-5 if objective == "dpop" else 3e-6  # it weighs a fall of the chosen answer fifty-fold
    for result, found, taken, _ in runs:
        assert result.losses == pytest.approx(alone.losses, rel=1e-6, abs=1e-4 if objective == "dpop" else 0)
        assert result.grad_norm == pytest.approx(alone.grad_norm, rel=tolerance)
        assert (result.num_tokens, result.num_learned) == (alone.num_tokens, 0)
        for i, (a, b) in enumerate(zip(result.margins, alone.margins, strict=True)):
            assert (a is None) == (b is None) == (not many or i == 3)
            assert a is None or a == pytest.approx(b, rel=1e-5, abs=1e-5)
        wrong = sum(float((g - found[n]).square().sum()) for n, g in gradients.items())
        assert math.sqrt(wrong) <= tolerance * scale
        for a, b in zip(taken, reference, strict=True):
            assert a == (None if b is None else Reference(approx(b.chosen), approx(b.rejected)))


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_recomputed_activations_give_the_same_gradients(tmp_path: Path, kind: str) -> None:
    """To the bit; every layer runs once more, in backward, and keeps nothing but its input in between."""
    save_tiny(CONFIGS[kind](), tmp_path)
    runs = []
    for recompute in (False, True):
        _, model = in_arena(tmp_path)
        layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
        optimizer, kept, calls = Recording(model, SETTINGS), [0], [0]

        def keep(t: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept[0] += t.numel() * t.element_size()
            return t

        def count(*_: Any, calls: list[int] = calls) -> None:
            calls[0] += torch.is_grad_enabled()

        handle = layers[0].register_forward_pre_hook(count)
        inner = layers[0].get_submodule("mlp").register_forward_pre_hook(count)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            train_step(model, optimizer, variants()[:2], recompute=recompute, learned_loss=0)
        handle.remove()
        inner.remove()
        assert "forward" not in vars(layers[0])
        runs.append((optimizer.seen, kept[0], calls[0]))
    (plain, all_kept, once), (again, inputs_kept, twice) = runs
    assert plain.keys() == again.keys()
    assert all(torch.equal(g, again[n]) for n, g in plain.items())
    assert twice == once + once // 2
    assert inputs_kept < all_kept / 2


def approx(value: float) -> Any:
    return pytest.approx(value, rel=1e-6)


def test_a_batch_is_one_by_one_what_each_example_is_alone(directory: Path) -> None:
    """Losses and margins of an example do not depend on its company."""
    examples = variants()
    _, model = in_arena(directory)
    optimizer = Apollo(model, OptimizerSettings(lr=1e-9, rank=8))
    together = train_step(model, optimizer, examples, "orpo", learned_loss=1e9)
    for i, example in enumerate(examples):
        objective = "sft" if example.rejected_ids is None else "orpo"
        alone = train_step(model, optimizer, [example], objective, learned_loss=1e9)
        assert alone.losses[0] == pytest.approx(together.losses[i], rel=1e-6)
        margin = together.margins[i]
        assert alone.margins[0] == (None if margin is None else pytest.approx(margin, rel=1e-5, abs=1e-5))


def test_only_the_learned_among_answers_to_one_context_are_passed_over(directory: Path) -> None:
    """The gradient is that of the others."""
    examples = variants()
    _, model = in_arena(directory)
    optimizer = Recording(model, OptimizerSettings(lr=1e-9, rank=8))
    losses = train_step(model, optimizer, examples, "orpo", learned_loss=1e9).losses
    limit = sorted(losses)[2]
    result = train_step(model, optimizer, examples, "orpo", learned_loss=limit)
    assert (result.num_learned, result.losses) == (2, losses)
    found = optimizer.seen
    _, model = in_arena(directory)  # as it was before that step
    optimizer = Recording(model, SETTINGS)
    some = [e for e, loss in zip(examples, losses, strict=True) if loss >= limit]
    train_step(model, optimizer, some, "orpo")
    share = sum(e.weight for e in some) / sum(e.weight for e in examples)
    for name, gradient in optimizer.seen.items():
        torch.testing.assert_close(found[name], gradient * share, rtol=1e-4, atol=1e-6)


def test_the_guilty_one_among_answers_to_one_context_is_named(hybrid: tuple[Arena, nn.Module]) -> None:
    """A gradient overflows where token 96 was read: in one of the four examples that share a forward."""
    arena, model = hybrid
    before = copies(arena)
    examples = variants()
    for example in examples:
        example.continuation_ids[:] = [min(t, 95) for t in example.continuation_ids]
    examples[3].continuation_ids[4] = 96

    def overflow(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda g: torch.where((args[0] == 96).unsqueeze(-1), math.inf, g))

    model.get_submodule("model.embed_tokens").register_forward_hook(overflow)
    with pytest.raises(
        NonFinite, match=r"^example 3: the gradient of model\.embed_tokens\.weight is not finite"
    ):
        train_step(model, Apollo(model, SETTINGS), examples, writing=arena.writing)
    assert same(arena, before)
    assert arena.writes == (0, 0)


def test_the_gradient_norm_is_limited(hybrid: tuple[Arena, nn.Module]) -> None:
    _, model = hybrid
    optimizer = Recording(model, SETTINGS)
    result = train_step(model, optimizer, batch(), max_grad_norm=0.25)
    assert result.grad_norm > 0.25
    assert check_tensors(optimizer.seen, "the gradient") == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("which", ["loss", "norm"])
def test_what_explodes_is_refused_before_the_write(hybrid: tuple[Arena, nn.Module], which: str) -> None:
    """Named by example, or by the tensor with the largest gradient; the same step within its bounds is made."""
    arena, model = hybrid
    optimizer = Apollo(model, SETTINGS)
    first = Bounds.after("sft", [1.0, 2.0], 3.0)
    assert (first.loss, first.norm) == (22.0, 3000.0)
    assert all(Bounds.after(other, [1.0], 3.0).loss == math.inf for other in ("dpo", "dpop", "sdft"))
    assert Bounds.after("sft", [0.002], 1e-3).norm == 1000.0, (
        "a first batch that is all but learned binds nobody"
    )
    bounds = Bounds(loss=0.5, norm=math.inf) if which == "loss" else Bounds(loss=math.inf, norm=1e-3)
    before = {n: t.clone() for n, t in arena.tensors.items()}
    words = (
        r"example \d: the loss is" if which == "loss" else r"example 0, .*norm .* most of it is in model\."
    )
    with pytest.raises(Exploded, match=words):
        train_step(model, optimizer, variants(), bounds=bounds)
    assert all(torch.equal(t, before[n]) for n, t in arena.tensors.items())
    assert optimizer.steps == 0
    assert train_step(model, optimizer, variants(), bounds=first).wrote


def test_a_bad_weight_is_met_before_any_write(hybrid: tuple[Arena, nn.Module]) -> None:
    arena, model = hybrid
    arena.tensors["model.embed_tokens.weight"][5] = math.nan
    before = copies(arena)
    with pytest.raises(NonFinite, match="example 0: the loss is nan"):
        train_step(model, Apollo(model, SETTINGS), batch(), writing=arena.writing)
    assert same(arena, before)
    assert arena.writes == (0, 0)


def test_the_guilty_example_is_named(tmp_path: Path) -> None:
    """A broken row of GPT-2's positions is met by the longest example only."""
    arena, model = in_arena(save_tiny(gpt2_config(), tmp_path))
    arena.tensors["transformer.wpe.weight"][71] = math.inf
    before = copies(arena)
    with pytest.raises(NonFinite, match="example 1"):
        train_step(model, Apollo(model, SETTINGS), batch(), writing=arena.writing)
    assert same(arena, before)


def test_a_bad_gradient_is_named_by_example_and_tensor(hybrid: tuple[Arena, nn.Module]) -> None:
    """The loss is finite, a gradient is not: an overflow in the backward pass."""
    arena, model = hybrid
    before = copies(arena)
    calls = []

    def overflow(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        calls.append(1)
        return (inputs[0] * math.inf,) if len(calls) == 2 else None

    down = model.get_submodule("model.layers.4.mlp.down_proj")
    down.register_full_backward_hook(overflow)
    with pytest.raises(NonFinite, match=r"example 1: the gradient of model\."):
        train_step(model, Apollo(model, SETTINGS), batch(), writing=arena.writing)
    assert same(arena, before)
    assert arena.writes == (0, 0)


def test_examples_that_do_not_fit_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    _, model = in_arena(save_tiny(gpt2_config(), tmp_path))
    optimizer = Apollo(model, SETTINGS)
    good = Example(context_ids=[1], continuation_ids=[2])
    with pytest.raises(BadExample, match="example 1: token id 97; the vocabulary has 97"):
        train_step(model, optimizer, [good, Example(context_ids=[1], continuation_ids=[97])])
    with pytest.raises(ContextOverflow, match="example 0: 257 tokens; the model reads 256"):
        train_step(model, optimizer, [Example(context_ids=[1] * 250, continuation_ids=[2] * 7)])
    train_step(model, optimizer, [Example(context_ids=[1] * 250, continuation_ids=[2] * 6)])
    with pytest.raises(BadExample, match="needs rejected_ids"):
        train_step(model, optimizer, [good], "orpo")
