"""Other engines on the same prompts: llama.cpp in this process, vLLM's CPU build in its own environment.

Both are optional: what is not installed is left out, and the page says so. llama.cpp (the package xllamacpp) reads
the GGUF file that the model was made from, 4 bits a weight, and the same weights in bf16, written here. vLLM (of
`.venv-vllm`, or SECONDNATURE_VLLM_PYTHON) reads the model's directory in bf16, after the others, not turn by turn
with them. One thread each, greedy, every answer exactly as long as asked for, nothing cached between turns.

    .venv-vllm/bin/python benchmarks/others.py JSON        # vLLM's side: prints JSON
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONTEXT_TOKENS = 512
"""Of each stream."""


def _say(text: str) -> None:
    """As `common.say`, which cannot be imported where vLLM is."""
    print(f"  {text}", file=sys.stderr, flush=True)


def write_bf16(source: Path, target: Path) -> None:
    """The GGUF file `source` with its weights in bf16, as secondnature reads them; vectors in fp32."""
    import gguf
    import numpy as np
    import torch

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        wide = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        narrow = torch.from_numpy(wide).to(torch.bfloat16)
        if narrow.ndim == 1:
            writer.add_tensor(tensor.name, narrow.float().numpy())
        else:
            raw = narrow.view(torch.uint8).numpy()
            writer.add_tensor(tensor.name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def llama_cpp(file: Path | None, streams: int) -> Generator[dict[str, Callable[..., Any]]]:
    """By name, what answers (prompts, number of tokens) on llama.cpp; empty where it, or the file, is not there."""
    if file is None or not importlib.util.find_spec("xllamacpp"):
        _say("llama.cpp is left out: " + ("no GGUF file" if file is None else "pip install xllamacpp"))
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(streams) as pool:
        wide = Path(folder) / "bf16.gguf"
        write_bf16(file, wide)
        yield {
            "llama_cpp_q4": _asking(_server(file, streams), pool),
            "llama_cpp_bf16": _asking(_server(wide, streams), pool),
        }


def _server(file: Path, streams: int) -> Any:
    import xllamacpp  # pyright: ignore[reportMissingImports]

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_parallel, settings.n_ctx = streams, streams * CONTEXT_TOKENS
    settings.n_gpu_layers, settings.verbosity = 0, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(settings)


def _asking(server: Any, pool: ThreadPoolExecutor) -> Callable[[list[list[int]], int], None]:
    def one(prompt: list[int], num_tokens: int) -> int:
        body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        return server.handle_completions(body | {"cache_prompt": False})["usage"]["completion_tokens"]

    def ask(prompts: list[list[int]], num_tokens: int) -> None:
        made = list(pool.map(lambda prompt: one(prompt, num_tokens), prompts))
        if made != [num_tokens] * len(prompts):
            raise RuntimeError(f"llama.cpp made {made} tokens; expected {num_tokens} each")

    return ask


def vllm(
    model: Path, prompts: dict[int, list[list[int]]], num_tokens: int, repeats: int
) -> dict[int, list[float]] | None:
    """Tokens per second of vLLM, by streams; None where its environment is not there, or does not answer."""
    python = Path(os.environ.get("SECONDNATURE_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
    if not python.is_file():
        _say(f"vLLM is left out: there is no {python} (make bench-vllm makes it)")
        return None
    from vllm_process import environment as of_vllm

    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task.json"
        what = {"model": str(model), "prompts": prompts, "num_tokens": num_tokens, "repeats": repeats}
        task.write_text(json.dumps(what))
        environment = of_vllm(Path(folder), None, {}) | {
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        with (Path(folder) / "log").open("wb") as log:
            command = [str(python), __file__, str(task)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, env=environment, check=False)
        if done.returncode:
            said = (Path(folder) / "log").read_text(errors="replace")[-2000:]
            _say(f"vLLM did not answer (status {done.returncode}) and is left out:\n{said}")
            return None
    return {int(streams): speeds for streams, speeds in json.loads(done.stdout.splitlines()[-1]).items()}


def _vllm_side(task: dict[str, Any]) -> dict[str, list[float]]:
    """In vLLM's environment."""
    import vllm as engine  # pyright: ignore[reportMissingImports]

    model = engine.LLM(
        task["model"],
        dtype="bfloat16",
        max_model_len=CONTEXT_TOKENS,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    how = engine.SamplingParams(temperature=0.0, max_tokens=task["num_tokens"], ignore_eos=True)
    found: dict[str, list[float]] = {}
    for streams, prompts in task["prompts"].items():
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        seconds: list[float] = []
        for _ in range(task["repeats"] + 1):  # the first one warms up
            begun = time.perf_counter()
            made = model.generate(asked, how, use_tqdm=False)
            seconds.append(time.perf_counter() - begun)
            assert all(len(one.outputs[0].token_ids) == task["num_tokens"] for one in made)
        found[streams] = [len(prompts) * task["num_tokens"] / s for s in seconds[1:]]
    return found


if __name__ == "__main__":
    print(json.dumps(_vllm_side(json.loads(Path(sys.argv[1]).read_text()))))
