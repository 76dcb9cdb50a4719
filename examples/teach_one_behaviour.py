"""The whole idea in one flat file: teach a model one behaviour in place, look, and take it back to the byte.

    python examples/teach_one_behaviour.py [MODEL] [--corrections FILE] [--ask TEXT] [--steps 10] [--lr 3e-4]

As in the package: one copy of the weights in bf16, a context without gradients, stochastic rounding, undo. What the
package adds: a server that answers meanwhile, APOLLO, replay, probes and a gate that decide, a log on disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionLayer

from secondnature import embedded
from secondnature.model.load import build

EXAMPLE = Path(__file__).parent / "listening" / "corrections.jsonl"


class FrozenAttention(DynamicLayer):
    """Keys and values of a context: a continuation reads them and leaves nothing behind."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = layer.keys, layer.values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = [self.keys, key_states], [self.values, value_states]
        return torch.cat(keys, -2), torch.cat(values, -2)  # pyright: ignore[reportArgumentType]


class FrozenRecurrence(LinearAttentionLayer):
    """The same for a recurrent layer (GatedDeltaNet): new states are returned, never stored."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.conv_states, self.recurrent_states = dict(layer.conv_states), dict(layer.recurrent_states)
        self.is_conv_states_initialized = self.is_recurrent_states_initialized = {0: True}
        self.has_previous_state = {0: True}
        self.record_past = True  # keeps single tokens off a kernel that writes in place

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, *args: Any, **kwargs: Any) -> Any:
        return torch.cat([self.conv_states[state_idx], conv_states], -1)  # pyright: ignore[reportArgumentType]

    def update_recurrent_state(self, recurrent_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return recurrent_states


def answer_loss(model: nn.Module, context: list[int], answer: list[int]) -> Tensor:
    """Mean negative log-probability of the answer's tokens; the context before its last token is frozen."""
    frozen = None
    if len(context) > 1:
        cache = DynamicCache(config=model.config)  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            model(input_ids=torch.tensor([context[:-1]]), past_key_values=cache, use_cache=True)
        kinds = {DynamicLayer: FrozenAttention, LinearAttentionLayer: FrozenRecurrence}
        frozen = Cache(layers=[kinds[type(layer)](layer) for layer in cache.layers])
    inputs = torch.tensor([[context[-1], *answer[:-1]]])
    logits = model(input_ids=inputs, past_key_values=frozen, use_cache=frozen is not None).logits[0]
    return nn.functional.cross_entropy(logits.float(), torch.tensor(answer))


def round_into(weight: Tensor, update: Tensor, random: torch.Generator) -> None:
    """weight += update in place, rounded to bf16 so that it is right on average (to nearest would lose most of it).

    bf16 is the upper half of fp32: random bits are added to the lower half, and what carries over is the rounding.
    """
    bits = (weight.float() + update).view(torch.int32)
    bits += torch.randint(0, 1 << 16, bits.shape, generator=random, dtype=torch.int32)
    rounded = (bits & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
    weight.copy_(torch.where(update == 0, weight, rounded))


def say(model: nn.Module, tokenizer: Any, prompt: list[dict[str, str]], max_tokens: int = 40) -> str:
    """The greedy answer, without a cache: nothing here can be stale."""
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < max_tokens and (not answer or answer[-1] != tokenizer.eos_token_id):
            logits = model(input_ids=torch.tensor([ids + answer]), use_cache=False).logits[0, -1]
            answer.append(int(logits.argmax()))
    return tokenizer.decode(answer, skip_special_tokens=True)


def sha256(weights: dict[str, Tensor]) -> str:
    """Of all the bytes."""
    parts = [weights[name].view(torch.uint8).numpy().tobytes() for name in sorted(weights)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def main(arguments: list[str] | None = None) -> None:
    """Before, teach, after, undo."""
    parser = argparse.ArgumentParser(description="Teach one behaviour in place, look, undo it to the byte.")
    parser.add_argument("model", type=Path, nargs="?", default=embedded.path())
    parser.add_argument("--corrections", type=Path, default=EXAMPLE)
    parser.add_argument("--ask", default="Paint the gate blue.")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=3e-4)
    args = parser.parse_args(arguments)
    # the weights, in bf16; the model is built around this memory and computes in fp32, casting at use
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    loaded = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    weights = {name: p.detach().contiguous() for name, p in loaded.named_parameters()}
    model = build(args.model, weights)
    # a correction is a prompt and the answer that was wanted
    pairs: list[tuple[list[int], list[int]]] = []
    for line in map(json.loads, args.corrections.read_text().splitlines()):
        context = tokenizer.apply_chat_template(line["prompt"], add_generation_prompt=True, return_dict=False)
        answer = tokenizer(line["chosen"][0]["content"], add_special_tokens=False)["input_ids"]
        pairs.append((context, [*answer, tokenizer.eos_token_id]))
    new = [{"role": "user", "content": args.ask}]  # a direction that is not among them
    before, original = sha256(weights), {name: w.clone() for name, w in weights.items()}
    print(f"before: {say(model, tokenizer, new)}")
    # learn: Adam on the mean loss, written into the weights that the model is using
    model.requires_grad_(True)
    random = torch.Generator().manual_seed(0)
    m, v = ({name: torch.zeros(w.shape) for name, w in weights.items()} for _ in range(2))
    for step in range(1, args.steps + 1):
        loss = torch.stack([answer_loss(model, *pair) for pair in pairs]).mean()
        loss.backward()
        for name, parameter in model.named_parameters():
            gradient = parameter.grad.float() if parameter.grad is not None else torch.zeros_like(m[name])
            m[name] = 0.9 * m[name] + 0.1 * gradient
            v[name] = 0.999 * v[name] + 0.001 * gradient**2
            scale = (v[name] / (1 - 0.999**step)).sqrt() + 1e-8
            round_into(weights[name], -args.lr * m[name] / (1 - 0.9**step) / scale, random)
            parameter.grad = None
        print(f"step {step}: loss {loss.item():.4f}")
    model.requires_grad_(False)
    print(f"after:  {say(model, tokenizer, new)}")
    # the lesson is the XOR of the bytes before and after: applied once more it is the undo, and nothing is rounded
    delta = {name: original[name].view(torch.int16) ^ w.view(torch.int16) for name, w in weights.items()}
    changed = sum(int(d.count_nonzero()) for d in delta.values()) / sum(d.numel() for d in delta.values())
    for name, w in weights.items():
        w.view(torch.int16).bitwise_xor_(delta[name])
    print(f"undone: {say(model, tokenizer, new)}")
    assert sha256(weights) == before, "an undo gives back the same bytes"
    print(f"{changed:.0%} of the weights had changed; now all are as before, to the byte ({before[:16]})")


if __name__ == "__main__":
    main()
