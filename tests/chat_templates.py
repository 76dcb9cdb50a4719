"""Chat templates in the shape of each family of models, written for these tests, and a tokenizer for any of them.

Each is short, and does what its family's does where an answer stands: what it writes before and after one, what it
trims, which thoughts it opens or closes, what it refuses.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from secondnature.model.chat import encode_chat, end_ids, teach

CHATML_TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% endfor %}"
)
INST = "{% for m in messages %}{% if m.role == 'assistant' %}{A}{% else %}{U}{% endif %}{% endfor %}"
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "{% set parts = m.content.split('</think>') %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' }}\n</think>\n\n"
    "{{ parts[-1].lstrip('\n') }}{% else %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
)
HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>"
    "{{ m.content }}{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<｜Assistant｜>"
    "{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% else %}<｜User｜>{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
)


def _ask(text: str) -> str:
    return "{% if add_generation_prompt %}" + text + "{% endif %}"


def _roles(head: str, tail: str, asks: str) -> str:
    """The same around each turn; `ROLE` stands for its role."""
    head = head.replace("ROLE", "{{ m.role }}")
    return "{% for m in messages %}" + head + "{{ m.content }}" + tail + "{% endfor %}" + _ask(asks)


TEMPLATES: dict[str, str] = {
    "chatml": CHATML_TURN + ASKS + "{% endif %}",
    "qwen2": CHATML_TURN + ASKS + "{% endif %}",
    "llama2": INST.replace("{A}", "{{ ' ' + m.content.strip() + ' ' + eos_token }}").replace(
        "{U}", "{{ bos_token }}[INST] {{ m.content.strip() }} [/INST]"
    ),
    "llama3": "{{ bos_token }}"
    + _roles(
        "<|start_header_id|>ROLE<|end_header_id|>\n\n",
        "<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ).replace("{{ m.content }}", "{{ m.content | trim }}"),
    "llama4": "{{ bos_token }}"
    + _roles(
        "<|header_start|>ROLE<|header_end|>\n\n", "<|eot|>", "<|header_start|>assistant<|header_end|>\n\n"
    ),
    "mistral": NO_SYSTEM
    + INST.replace("{A}", " {{ m.content }}</s>").replace("{U}", "[INST] {{ m.content }}[/INST]"),
    "mistral-tekken": INST.replace("{A}", "{{ m.content }}</s>").replace(
        "{U}", "[INST]{{ m.content }}[/INST]"
    ),
    "gemma2": NO_SYSTEM + GEMMA + _ask("<start_of_turn>model\n"),
    "gemma-with-eos": GEMMA
    + _ask("<start_of_turn>model\n")
    + "{% if not add_generation_prompt %}<eos>{% endif %}",
    "gemma4": GEMMA.replace("<start_of_turn>", "<|turn>").replace("<end_of_turn>", "<turn|>")
    + _ask("<|turn>model\n<|channel>thought\n<channel|>"),
    "phi3": _roles("<|ROLE|>\n", "<|end|>\n", "<|assistant|>\n")
    + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}",
    "phi4": _roles("<|im_start|>ROLE<|im_sep|>", "<|im_end|>", "<|im_start|>assistant<|im_sep|>"),
    "deepseek-v3": R1.replace("<｜Assistant｜><think>\n", "<｜Assistant｜>"),
    "deepseek-r1": R1,
    "qwq": CHATML_TURN + ASKS + "<think>\n{% endif %}",
    "qwen3": QWEN3
    + ASKS
    + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    "qwen3.5": QWEN3
    + ASKS
    + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n"
    "{% endif %}{% endif %}",
    "nemotron": CHATML_TURN.replace(
        "{{ m.content }}", "{{ '<think></think>' if m.role == 'assistant' else '' }}{{ m.content }}"
    )
    + ASKS
    + "<think>\n{% endif %}",
    "command-r": "{{ bos_token }}"
    + _roles(
        "<|START_OF_TURN_TOKEN|><|ROLE|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|assistant|>",
    ),
    "command-a": "{% for m in messages %}<|START_OF_TURN_TOKEN|>{% if m.role == 'assistant' %}<|CHATBOT_TOKEN|>"
    "<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>{% else %}<|USER_TOKEN|>{{ m.content }}{% endif %}"
    "<|END_OF_TURN_TOKEN|>{% endfor %}" + _ask("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"),
    "granite": _roles(
        "<|start_of_role|>ROLE<|end_of_role|>",
        "<|end_of_text|>\n",
        "<|start_of_role|>assistant<|end_of_role|>",
    ),
    "zephyr": _roles("<|ROLE|>\n", "{{ eos_token }}\n", "<|assistant|>\n"),
    "vicuna": "{% for m in messages %}{% if m.role == 'assistant' %}ASSISTANT: {{ m.content }}</s>{% else %}"
    "USER: {{ m.content }} {% endif %}{% endfor %}" + _ask("ASSISTANT:"),
    "alpaca": _roles("### ROLE:\n", "\n\n", "### assistant:\n"),
    "glm4": "[gMASK]<sop>" + _roles("<|ROLE|>\n", "", "<|assistant|>\n"),
    "gpt-oss": HARMONY,
    "olmo2": "{{ bos_token }}" + _roles("<|ROLE|>\n", "{{ eos_token }}", "<|assistant|>\n"),
    "falcon3": _roles("<|ROLE|>\n", "{{ '\n' if not loop.last else eos_token }}", "<|assistant|>\n"),
}
CONTROL = re.compile(
    r"<\|[A-Za-z_]+\|>|<｜[^｜]+｜>|</?s>|<(?:start|end)_of_turn>|<eos>|<sop>|<\|(?:turn|channel)>|<(?:turn|channel)\|>"
    r"|\[/?[A-Za-z]+\]"
)
ROLES = ["<|user|>", "<|assistant|>", "<|system|>", "<|USER|>"]


def tokenizer_for(template: str, eos: str | None = None) -> Any:
    """A tokenizer of bytes that knows the control tokens which a template writes; without `eos` it guesses one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("i", "s"), ("Ġ", "is"), ("Ċ", "Ċ")]
    vocabulary = {c: i for i, c in enumerate([*alphabet, *("".join(m) for m in merges)])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    written = sorted({*CONTROL.findall(template), *(ROLES if "<|{{" in template else [])})
    guess = "<|im_end|>" if "<|im_end|>" in template else "</s>"
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token=eos or guess)
    fast.add_special_tokens({"additional_special_tokens": written})
    fast.add_tokens(["<think>", "</think>"])
    fast.chat_template = template
    return fast


PIECES = [
    *(
        "It is Paris.",
        " ",
        "\n",
        "\n\n",
        "<|im_end|>",
        "</s>",
        "<|eot_id|>",
        "<end_of_turn>",
        "[/INST]",
        "🦄",
    ),
    *("<|end|>", "<eos>", "<|user|>", "é", "{{ x }}", "{% raw %}", "<｜User｜>", "<|return|>", "no", "is"),
]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def texts(seed: int, count: int) -> list[str]:
    """Contents as people might send them, control tokens of all families among them; none is blank."""
    generator = np.random.default_rng(seed)
    found: list[str] = []
    for _ in range(count):
        pieces = generator.choice(PIECES, size=int(generator.integers(1, 7)))
        found.append("".join(pieces) if "".join(pieces).strip() else "x")
    return found


def check(tokenizer: Any, prompt: list[dict[str, str]], text: str) -> None:
    """The property: context = generation prompt and what is between; taught = the answer and one end."""
    found = teach(tokenizer, prompt, answer(text))
    asked = encode_chat(tokenizer, prompt)
    assert found.context == [*asked, *found.between]
    *said, end = found.continuation
    ends = end_ids(tokenizer)
    assert end in ends
    assert not ends & set(said)
    assert tokenizer.decode(said).strip() == text.strip()
