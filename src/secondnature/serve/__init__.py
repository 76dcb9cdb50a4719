"""The room that puts servers together, and knows all others: `local` (one process), `vllm` (inside vLLM).

Heavy; import the modules.
"""
