"""The room of HTTP: routes, guards, stamps, metrics (server). Thin: what they do lies in `lessons` and `engines`.

`application` puts an application together, `teaching` holds the routes that teach, `completions` OpenAI's for the
local engine, `beside_vllm` stands in front of vLLM's own. Heavy; import the modules.
"""
