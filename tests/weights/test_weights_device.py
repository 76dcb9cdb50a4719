"""The arena on a GPU, with files in the place of its memory (`fake_gpu`): manifest, refusals, bracket, undo."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_gpu import FakeGpu, fake_gpu, together

from secondnature.errors import WeightsError
from secondnature.weights import ipc
from secondnature.weights.arena import Arena
from secondnature.weights.attach import attach, counters
from secondnature.weights.content import content_id
from secondnature.weights.cuda import DeviceArena


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[FakeGpu]:
    with fake_gpu(tmp_path) as found:
        yield found


def some_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "a.weight": torch.randn(7, 5).to(torch.bfloat16),
        "b.weight": torch.randn(3, 1, 4).to(torch.bfloat16),
        "c": torch.randn(11),
    }


def adopted(gpu: FakeGpu) -> DeviceArena:
    """Two tensors in one allocation, one in its own."""
    weights = some_weights()
    a, b = together(gpu, [weights["a.weight"], weights["b.weight"]])
    return DeviceArena.adopt({"a.weight": a, "b.weight": b, "c": gpu.place(weights["c"])})


# a process of its own: the fake's owner cannot open its own export, as the driver's cannot
OTHER = """
import sys
from pathlib import Path
import torch
from fake_gpu import fake_gpu
from secondnature.weights.attach import attach
with fake_gpu(Path("/tmp"), *sys.argv[1:]) as gpu:
    arena = attach(sys.stdin.read())
    assert arena.manifest(), "it can be handed on"
    with arena.writing():
        arena.tensors["b.weight"].fill_(3)
        arena.tensors["c"][2] = 42.0
    print([t.stride() for t in arena.tensors.values()], gpu.log)
"""


def other(manifest: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", OTHER, *arguments],
        input=manifest,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={"PYTHONPATH": str(Path(__file__).parent.parent), "PATH": ""},
    )


def test_nothing_is_moved_and_each_allocation_is_exported_once(gpu: FakeGpu) -> None:
    weights = some_weights()
    a, b = together(gpu, [weights["a.weight"], weights["b.weight"]])
    arena = DeviceArena.adopt({"a.weight": a, "b.weight": b, "tied": a})
    assert gpu.log.count("export") == 1
    assert arena.tensors["a.weight"] is a
    assert content_id({n: arena.tensors[n] for n in ("a.weight", "b.weight")}) == content_id(
        {n: weights[n] for n in ("a.weight", "b.weight")}
    )
    plan = json.loads(arena.manifest())
    assert [t["storage"] for t in plan["tensors"]] == [0, 0, 0]
    assert [t["offset"] for t in plan["tensors"]] == [8, 8 + 35 + 8, 8]


def test_another_process_maps_them_and_writes(gpu: FakeGpu) -> None:
    arena = adopted(gpu)
    done = other(arena.manifest())
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[(5, 1), (4, 4, 1), (1,)] ['open', 'open', 'wait']"
    assert bool((arena.tensors["b.weight"] == 3).all())
    assert float(arena.tensors["c"][2]) == 42.0
    assert torch.equal(arena.tensors["a.weight"], some_weights()["a.weight"]), (
        "what lies beside it is untouched"
    )
    assert arena.writes == (1, 1)


def test_another_card_is_refused(gpu: FakeGpu) -> None:
    done = other(adopted(gpu).manifest(), "00000000-0000-0000-0000-000000000002")
    assert "the weights lie on GPU 00000000-0000-0000-0000-000000000001" in done.stderr


def test_a_view_that_is_not_contiguous_keeps_its_strides(gpu: FakeGpu) -> None:
    (whole,) = together(gpu, [torch.arange(12.0).view(3, 4)])
    arena = DeviceArena.adopt({"b.weight": whole.T, "c": whole[1]})
    done = other(arena.manifest())
    assert done.stdout.startswith("[(1, 4), (1,)]"), done.stderr
    assert whole.tolist() == [[3.0] * 4, [3.0, 3.0, 42.0, 3.0], [3.0] * 4]


def test_the_owner_gets_its_own_tensors_back(gpu: FakeGpu) -> None:
    arena = adopted(gpu)
    again = attach(arena.manifest())
    assert all(again.tensors[name] is tensor for name, tensor in arena.tensors.items())
    with again.writing():
        assert arena.writes == (1, 0)
    arena.seen_as({"other name": arena.tensors["a.weight"]})
    assert set(attach(arena.manifest()).tensors) == {"a.weight", "b.weight", "c"}
    assert "open" not in gpu.log


def test_who_schedules_needs_no_gpu(gpu: FakeGpu) -> None:
    arena = adopted(gpu)
    seen = counters(arena.manifest())
    with arena.writing():
        assert seen.writes == (1, 0)
    assert seen.writes == (1, 1)
    assert "open" not in gpu.log
    on_host = Arena.create(some_weights())
    assert counters(on_host.manifest()).writes == (0, 0)
    with on_host.writing():
        assert counters(on_host.manifest()).writes == (1, 0)


def test_begun_kernels_wait_done(gpu: FakeGpu) -> None:
    arena = adopted(gpu)
    gpu.log.clear()
    seen: list[tuple[str, tuple[int, int]]] = []
    waited = gpu.synchronize
    gpu.synchronize = lambda: (seen.append(("wait", arena.writes)), waited())[1]  # type: ignore[method-assign]
    with arena.writing():
        seen.append(("kernel", arena.writes))
    seen.append(("after", arena.writes))
    assert seen == [("kernel", (1, 0)), ("wait", (1, 0)), ("after", (1, 1))]


def test_a_device_that_fails_leaves_the_epoch_odd_until_the_undo(gpu: FakeGpu) -> None:
    arena = adopted(gpu)
    before = {name: tensor.clone() for name, tensor in arena.tensors.items()}
    gpu.broken = "CUDA error: unspecified launch failure (719)\nmore of it"
    with pytest.raises(WeightsError, match=r"unspecified launch failure \(719\) \(") as e, arena.writing():
        arena.tensors["c"].zero_()
    assert "restart the server" in e.value.hint
    assert arena.writes == (1, 0)
    with pytest.raises(WeightsError, match="719"):
        arena.write(before)
    assert arena.writes == (2, 0), "an undo that the device did not take is none"
    gpu.broken = ""
    arena.write(before)
    assert arena.writes == (3, 3)
    assert content_id(arena.tensors) == content_id(before)


def test_an_error_between_two_kernels_is_waited_for_too(gpu: FakeGpu) -> None:
    arena = adopted(gpu)
    gpu.log.clear()
    with pytest.raises(ValueError, match="ours"), arena.writing():
        raise ValueError("ours")
    assert gpu.log == ["wait"]
    assert arena.writes == (1, 1)


def test_a_tensor_on_the_host_is_refused_by_name(gpu: FakeGpu) -> None:
    with pytest.raises(WeightsError, match="tensor b: its memory is on cpu") as e:
        DeviceArena.adopt({"a": gpu.place(torch.zeros(3)), "b": torch.zeros(3)})
    assert "offload" in e.value.hint


def test_weights_on_two_cards_are_refused(gpu: FakeGpu) -> None:
    one, two = gpu.place(torch.zeros(3)), gpu.place(torch.zeros(3))
    export = ipc.export

    def export_elsewhere(storage: torch.UntypedStorage) -> dict[str, Any]:
        found = export(storage)
        return (
            {**found, "uuid": "another"} if storage.data_ptr() == two.untyped_storage().data_ptr() else found
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ipc, "export", export_elsewhere)
        with pytest.raises(WeightsError, match="tensor b lies on GPU another"):
            DeviceArena.adopt({"a": one, "b": two})


@pytest.mark.parametrize("manifest", ["{}", "[]", "nonsense", '{"storages": []}', '{"pid": 1}'])
def test_what_is_no_manifest_is_refused(manifest: str) -> None:
    for opened in (attach, counters):
        with pytest.raises(WeightsError, match="not an arena's manifest"):
            opened(manifest)


def test_one_whose_owner_is_gone_is_refused(gpu: FakeGpu) -> None:
    plan = json.loads(adopted(gpu).manifest())
    for opened in (attach, counters):
        with pytest.raises(WeightsError, match="cannot map"):
            opened(json.dumps({**plan, "fd": 9999}))


# ------------------------------------------------------------------------ the two functions, on what torch may say
HANDLE = b"\x02c" + bytes(64)


class FarStorage:
    """A storage on a GPU, as far as `export` looks at it."""

    device = torch.device("cuda", 0)

    def __init__(self, *values: Any, fails: str = "") -> None:
        self._values, self._fails = values, fails

    def _share_cuda_(self) -> tuple[Any, ...]:
        if self._fails:
            raise RuntimeError(self._fails)
        return self._values


def exported(storage: FarStorage, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="the card"))
    return ipc.export(storage)  # type: ignore[arg-type]


def test_an_export_is_plain_json(monkeypatch: pytest.MonkeyPatch) -> None:
    found = exported(FarStorage(0, HANDLE, 512, 64, b"/counter", 3, b"event", True), monkeypatch)
    assert json.loads(json.dumps(found)) == {
        "uuid": "the card",
        "handle": base64.b64encode(HANDLE).decode(),
        "size": 512,
        "offset": 64,
        "counter": "/counter",
        "counter_at": 3,
        "event": base64.b64encode(b"event").decode(),
        "wait": True,
    }


@pytest.mark.parametrize(
    ("storage", "found", "hint"),
    [
        (
            FarStorage(0, b"\x02e" + bytes(64), 1, 0, b"", 0, b"", True),
            "expandable segments",
            "expandable_segments",
        ),
        (FarStorage(0, b"\x02x" + bytes(64), 1, 0, b"", 0, b"", True), "kind b'x'", "install the torch"),
        (FarStorage(0, bytes(64), 1, 0, b"", 0, b"", True), "64 bytes", "install the torch"),
        (FarStorage(0, HANDLE, 1, 0), "4 values; expected 8", "install the torch"),
        (
            FarStorage(fails="CUDA error: invalid argument\nmore"),
            r"shared: CUDA error: invalid argument \(",
            "sleep mode",
        ),
    ],
)
def test_memory_that_cannot_be_shared_is_refused(
    storage: FarStorage, found: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with pytest.raises(WeightsError, match=found) as e:
        exported(storage, monkeypatch)
    assert hint in e.value.hint


def test_a_slice_of_a_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-8f1bd0e2")
    with pytest.raises(WeightsError, match="MIG"):
        exported(FarStorage(0, HANDLE, 512, 64, b"/counter", 3, b"event", True), monkeypatch)


def test_host_memory_is_refused() -> None:
    with pytest.raises(WeightsError, match="is on cpu"):
        ipc.export(torch.zeros(3).untyped_storage())


def test_a_card_that_is_not_seen_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="mine"))
    with pytest.raises(WeightsError, match="GPU theirs; this process sees mine") as e:
        ipc.open_({"uuid": "theirs"})
    assert "CUDA_VISIBLE_DEVICES" in e.value.hint
