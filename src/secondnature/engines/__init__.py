"""The room of what answers: requests (`base`) and stamps (`stamps`), the local engine, vLLM's.

Heavy; import the modules.
"""
