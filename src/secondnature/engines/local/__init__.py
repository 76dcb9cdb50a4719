"""The local engine: continuous batching of a Hugging Face model over the arena, on CPUs (server).

`engine` is the loop, `rows` the running batch, `answer` one answer on its way; `sampling` and `text` go from
logits to words.
"""
