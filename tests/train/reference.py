"""An independent fp64 reference of the frozen-context loss: one token at a time, plain tensor algebra.

Written from the papers and the config's meaning (Gated DeltaNet: Yang et al. 2024, arXiv 2412.06464; gated
attention with partial rotary positions and normed queries and keys as in Qwen3; GPT-2), not from transformers'
modelling code and not from ours: no chunks, no cache objects, no batches. The state after the context's last but
one token is detached at every layer; that is all that "frozen" means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]
State = list[dict[str, Tensor]]


def rms(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """q (heads, d), keys and values (kv heads, tokens, d): one query against all that was read so far."""
    groups = q.shape[0] // keys.shape[0]
    out = []
    for head in range(q.shape[0]):
        scores = keys[head // groups] @ q[head] * scale
        out.append(torch.softmax(scores, dim=0) @ values[head // groups])
    return torch.stack(out)


def append(state: dict[str, Tensor], name: str, value: Tensor) -> Tensor:
    """Add one token's (heads, d) to the remembered (heads, tokens, d)."""
    new = value.unsqueeze(1)
    return torch.cat([state[name], new], dim=1) if name in state else new


class Qwen:
    """Qwen3.5's text hybrid, and dense Qwen3 (no recurrent layers, no output gate, norms around 1)."""

    def __init__(self, config: Any, weights: Weights) -> None:
        self.c, self.w = config, weights
        self.hybrid = config.model_type == "qwen3_5_text"
        self.kinds = list(config.layer_types)
        rope = config.rope_parameters
        dims = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
        # the model's own table is fp32; its values are part of the model
        exponents = torch.arange(0, dims, 2, dtype=torch.float32) / dims
        self.frequencies = (1.0 / rope["rope_theta"] ** exponents).double()

    def empty(self) -> State:
        return [{} for _ in self.kinds]

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.w[name]
        return rms(x, self.c.rms_norm_eps) * (1 + weight if self.hybrid else weight)

    def rotate(self, x: Tensor, position: int) -> Tensor:
        half = len(self.frequencies)
        angle = position * self.frequencies
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    def attention(self, x: Tensor, at: str, position: int, state: dict[str, Tensor]) -> tuple[Tensor, Any]:
        heads, kv_heads, d = self.c.num_attention_heads, self.c.num_key_value_heads, self.c.head_dim
        projected = self.w[f"{at}.q_proj.weight"] @ x
        gate = None
        if self.hybrid:
            both = projected.view(heads, 2 * d)
            projected, gate = both[:, :d], both[:, d:].reshape(-1)
        q = self.rotate(self.norm(projected.reshape(heads, d), f"{at}.q_norm.weight"), position)
        k = (self.w[f"{at}.k_proj.weight"] @ x).view(kv_heads, d)
        k = self.rotate(self.norm(k, f"{at}.k_norm.weight"), position)
        v = (self.w[f"{at}.v_proj.weight"] @ x).view(kv_heads, d)
        new = {"k": append(state, "k", k), "v": append(state, "v", v)}
        out = attend(q, new["k"], new["v"], d**-0.5).reshape(-1)
        if gate is not None:
            out = out * torch.sigmoid(gate)
        return self.w[f"{at}.o_proj.weight"] @ out, new

    def recurrence(self, x: Tensor, at: str, state: dict[str, Tensor]) -> tuple[Tensor, Any]:
        c = self.c
        nk, nv, dk, dv = (
            c.linear_num_key_heads,
            c.linear_num_value_heads,
            c.linear_key_head_dim,
            c.linear_value_head_dim,
        )
        mixed = self.w[f"{at}.in_proj_qkv.weight"] @ x
        kernel = self.w[f"{at}.conv1d.weight"][:, 0]
        width = kernel.shape[1]
        before = state.get("inputs", torch.zeros(len(mixed), width - 1, dtype=torch.float64))
        inputs = torch.cat([before, mixed[:, None]], dim=1)
        mixed = torch.nn.functional.silu((inputs * kernel).sum(1))
        q, k, v = (
            mixed[: nk * dk].view(nk, dk),
            mixed[nk * dk : 2 * nk * dk].view(nk, dk),
            mixed[2 * nk * dk :],
        )
        q = q / torch.sqrt((q * q).sum(-1, keepdim=True) + 1e-6) / math.sqrt(dk)
        k = k / torch.sqrt((k * k).sum(-1, keepdim=True) + 1e-6)
        v = v.view(nv, dv)
        beta = torch.sigmoid(self.w[f"{at}.in_proj_b.weight"] @ x)
        dt = torch.log1p(torch.exp(self.w[f"{at}.in_proj_a.weight"] @ x + self.w[f"{at}.dt_bias"]))
        decay = torch.exp(-torch.exp(self.w[f"{at}.A_log"]) * dt)
        old = state.get("memory", torch.zeros(nv, dk, dv, dtype=torch.float64))
        memory, read = [], []
        for head in range(nv):
            key, query = k[head * nk // nv], q[head * nk // nv]
            faded = decay[head] * old[head]
            now = faded + beta[head] * torch.outer(key, v[head] - faded.T @ key)
            memory.append(now)
            read.append(now.T @ query)
        out = rms(torch.stack(read), c.rms_norm_eps) * self.w[f"{at}.norm.weight"]
        out = out * torch.nn.functional.silu((self.w[f"{at}.in_proj_z.weight"] @ x).view(nv, dv))
        new = {"inputs": inputs[:, 1:], "memory": torch.stack(memory)}
        return self.w[f"{at}.out_proj.weight"] @ out.reshape(-1), new

    def read(self, token: int, position: int, state: State) -> tuple[Tensor, State]:
        """Logits (V) after one more token, and the state after it."""
        x = self.w["model.embed_tokens.weight"][token]
        after: State = []
        for i, kind in enumerate(self.kinds):
            at = f"model.layers.{i}"
            h = self.norm(x, f"{at}.input_layernorm.weight")
            if kind == "full_attention":
                h, new = self.attention(h, f"{at}.self_attn", position, state[i])
            else:
                h, new = self.recurrence(h, f"{at}.linear_attn", state[i])
            after.append(new)
            x = x + h
            h = self.norm(x, f"{at}.post_attention_layernorm.weight")
            up = self.w[f"{at}.mlp.up_proj.weight"] @ h
            gate = torch.nn.functional.silu(self.w[f"{at}.mlp.gate_proj.weight"] @ h)
            x = x + self.w[f"{at}.mlp.down_proj.weight"] @ (gate * up)
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return head @ self.norm(x, "model.norm.weight"), after


class GPT2:
    """GPT-2 (Radford et al. 2019) with tied head; matrices are stored (in, out)."""

    def __init__(self, config: Any, weights: Weights) -> None:
        self.c, self.w = config, weights

    def empty(self) -> State:
        return [{} for _ in range(self.c.n_layer)]

    def norm(self, x: Tensor, at: str) -> Tensor:
        centred = x - x.mean()
        return rms(centred, self.c.layer_norm_epsilon) * self.w[f"{at}.weight"] + self.w[f"{at}.bias"]

    def linear(self, x: Tensor, at: str) -> Tensor:
        return x @ self.w[f"{at}.weight"] + self.w[f"{at}.bias"]

    def read(self, token: int, position: int, state: State) -> tuple[Tensor, State]:
        """Logits (V) after one more token, and the state after it."""
        heads, d = self.c.n_head, self.c.n_embd // self.c.n_head
        x = self.w["transformer.wte.weight"][token] + self.w["transformer.wpe.weight"][position]
        after: State = []
        for i in range(self.c.n_layer):
            at = f"transformer.h.{i}"
            qkv = self.linear(self.norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn")
            q, k, v = (part.view(heads, d) for part in qkv.chunk(3))
            new = {"k": append(state[i], "k", k), "v": append(state[i], "v", v)}
            after.append(new)
            x = x + self.linear(attend(q, new["k"], new["v"], d**-0.5).reshape(-1), f"{at}.attn.c_proj")
            h = self.linear(self.norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc")
            h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
            x = x + self.linear(h, f"{at}.mlp.c_proj")
        return self.w["transformer.wte.weight"] @ self.norm(x, "transformer.ln_f"), after


def reference_logps(
    config: Any, weights: Weights, context: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[Tensor]:
    """fp64 log-probabilities of each continuation's tokens, the context frozen but for its last token."""
    model = GPT2(config, weights) if config.model_type == "gpt2" else Qwen(config, weights)
    state = model.empty()
    with torch.no_grad():
        for position, token in enumerate(context[:-1]):
            _, state = model.read(token, position, state)
    frozen = [{k: v.detach() for k, v in layer.items()} for layer in state]
    found: list[Tensor] = []
    for continuation in continuations:
        state, logps = frozen, []
        for i, (token, target) in enumerate(
            zip([context[-1], *continuation[:-1]], continuation, strict=True)
        ):
            logits, state = model.read(token, len(context) - 1 + i, state)
            logps.append(torch.log_softmax(logits, dim=0)[target])
        found.append(torch.stack(logps))
    return found
