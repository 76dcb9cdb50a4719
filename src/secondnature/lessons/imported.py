"""A change that was taught elsewhere: a lesson file is added to the weights, on trial like any other (server).

Where the weights are those that the lesson started from there, its delta is applied, and the result is compared
with the version that it had there before a byte is written. Where they are others, its arithmetic difference is
added in fp32 and rounded to nearest, after a first pass has seen that every sum is finite. What is not in the file
is computed: of a lesson that stood on the model's own weights, the difference follows from its delta.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from pathlib import Path

from secondnature import storage
from secondnature.engines.generation import GenerationResult
from secondnature.errors import BadDelta, BadInput, WrongState
from secondnature.lessons.change import CheckIn
from secondnature.lessons.job import Job
from secondnature.lessons.lesson_file import LessonFile, open_
from secondnature.lessons.log import Log
from secondnature.lessons.prober import Prober
from secondnature.lessons.weights import ServedWeights
from secondnature.records import Lesson, PartName
from secondnature.weights import checkpoint, delta, difference, xor
from secondnature.weights.content import ContentHasher, Named, content_id
from secondnature.weights.tensor_file import spans
from secondnature.weights.updates import UPDATE_FILE, stored_update

__all__ = ["ImportedChange", "check_sizes"]

_HEADER_BYTES = 1 << 16
_HEADER_BYTES_PER_TENSOR = 2048
"""So long may the headers of what is packed be: names, offsets and sizes."""


class ImportedChange:
    """The change that a `POST /v1/lessons/import` asks for."""

    def __init__(self, job: Job, *, log: Log, weights: ServedWeights, prober: Prober) -> None:
        assert job.source is not None, "an import has a file"
        self._job = job
        self._source: LessonFile = job.source
        self._log = log
        self._weights = weights
        self._prober = prober
        self.answers: list[GenerationResult] = []
        """The greedy answers to the plan's samples, before."""

    def plan_again(self) -> None:
        """The plan stays: it hangs on the file alone. Raises BadInput: that is another one now."""
        found = open_(self._source.path)
        if found.sha256 != self._source.sha256:
            raise BadInput(f"{found.path}: has changed since it was accepted", "import it again")

    def prepare(self, check_in: CheckIn) -> None:
        """Ask what is compared."""
        self.answers = self.sample(check_in)

    def sample(self, check_in: CheckIn) -> list[GenerationResult]:
        """The greedy answers to the sample prompts, by the weights as they are."""

        def count(done: int, total: int) -> None:
            self._job.count(done, total)
            check_in()

        samples = self._job.plan.samples
        self._job.enter("answering samples", "answers", len(samples))
        return self._prober.answers([s.context for s in samples], count)

    def apply(self, check_in: CheckIn) -> Lesson:
        """Write the weights. Raises BadInput, BadDelta, NonFinite, WrongState: nothing was written."""
        lesson, manifest = self._job.lesson, self._source.manifest
        parent, version = str(manifest.lesson.parent), str(manifest.lesson.version)
        tensors = self._weights.arena.tensors
        with self._copied("delta.safetensors") as path:
            stored = delta.open_(path, manifest.parts["delta.safetensors"].sha256)
            stored.check(tensors)
            if (stored.base, stored.result) != (parent, version):
                raise BadDelta(
                    f"{self._source.path}: its delta leads from {stored.base} to {stored.result}; its entry says "
                    f"{parent} to {version}",
                    "get the file again",
                )
            update_sha256 = self._take_update()
            exact = content_id(tensors, like=parent) == parent
            if exact:
                self._write_exactly(stored, version, check_in)
            else:
                self._add(stored, parent, version, check_in)
        assert lesson.imported is not None, "an import says where it is from"
        how = (
            "the same bytes"
            if exact
            else "added to other weights than it was taught on: its difference in fp32, rounded to nearest"
        )
        return lesson.model_copy(
            update={
                "imported": lesson.imported.model_copy(update={"exact": exact}),
                "optimizer_after": lesson.optimizer_before,
                "update_sha256": update_sha256,
                "reason": f"imported from {manifest.model_name}, lesson {manifest.lesson.id}: {how}",
            }
        )

    def _take_update(self) -> str | None:
        """What the lesson meant to change, into its directory; the checksum. Raises BadDelta: it is of another
        model."""
        if not self._source.has("update.safetensors"):
            return None
        directory, tensors = self._log.directory(self._job.lesson), self._weights.arena.tensors
        with self._copied("update.safetensors") as path:
            path.replace(directory / UPDATE_FILE)
        for name, part in stored_update(directory).parts.items():
            if name not in tensors or tuple(tensors[name].shape) != part.shape:
                raise BadDelta(
                    f"{self._source.path}: its update of tensor {name[:120]} does not fit these weights",
                    "get the file again",
                )
        return self._source.manifest.parts["update.safetensors"].sha256

    def _write_exactly(self, stored: delta.StoredDelta, version: str, check_in: CheckIn) -> None:
        """The delta, whose result was seen to be the version that it had there."""
        after = self._weights.differing(stored, back=False)
        found = content_id(self._counted("checking the difference", after, check_in), like=version)
        if found != version:
            raise BadDelta(
                f"{self._source.path}: the lesson would give {found}; expected {version}",
                "get the file again",
            )
        changed = (pair for pair in self._weights.differing(stored, back=False) if pair[0] in stored.sizes)
        self._weights.arena.write(self._counted("writing the lesson", changed, check_in))

    def _add(self, stored: delta.StoredDelta, parent: str, version: str, check_in: CheckIn) -> None:
        """The arithmetic difference, added to the weights as they are."""
        with contextlib.ExitStack() as stack:
            held = None
            if self._source.has("difference.safetensors"):
                held = difference.open_(stack.enter_context(self._copied("difference.safetensors")))
                held.check(self._weights.arena.tensors)
            elif parent != self._source.manifest.model.base_version:
                raise WrongState(
                    f"{self._source.path}: the lesson was taught on {parent}, these weights are others, and its "
                    "difference is not in the file",
                    "export it again",
                )
            for _ in self._counted("checking the difference", self._sums(stored, held, version), check_in):
                pass
            sums = self._sums(stored, held, None)
            self._weights.arena.write(self._counted("writing the lesson", sums, check_in))

    def _sums(
        self, stored: delta.StoredDelta, held: difference.StoredDifference | None, version: str | None
    ) -> Iterator[Named]:
        """What each changed tensor becomes. `version`: also see that the delta ends at it, where one can."""
        mine = self._weights.arena.tensors
        if held is not None:
            for name in sorted(held.sizes):
                yield name, difference.plus(name, mine[name], held.of(name, mine[name]))
            return
        digests = ContentHasher(version) if version is not None else None
        for name, before in checkpoint.stream(self._log.base_dir, self._log.dtypes):
            if name not in stored.sizes:
                if digests is not None:
                    digests.add(name, before)
                continue
            after = before.clone()
            stored.apply_(name, after)
            if digests is not None:
                digests.add(name, after)
            yield name, difference.plus(name, mine[name], difference.between(before, after))
            del before, after  # before the next ones are made
        if digests is not None and digests.id() != version:
            raise BadDelta(
                f"{self._source.path}: its delta gives {digests.id()}; expected {version}",
                "get the file again",
            )

    @contextlib.contextmanager
    def _copied(self, name: PartName) -> Generator[Path]:
        """A part as a file beside the lesson, for the time of the block; its header is short enough to be read."""
        path = storage.temporary_name(self._log.directory(self._job.lesson) / f"imported-{name}")
        try:
            self._source.copy(name, path)
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
            limit = _header_limit(len(self._weights.arena.tensors))
            if length > limit:
                raise BadInput(
                    f"{self._source.path}: {name} has a header of {length:,} bytes; at most {limit:,}"
                )
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _counted(self, phase: str, weights: Iterator[Named], check_in: CheckIn) -> Iterator[Named]:
        total = len(self._weights.arena.tensors)
        self._job.enter(phase, "tensors", total)
        for done, (name, tensor) in enumerate(weights):
            self._job.count(done, total)
            check_in()
            yield name, tensor
            del tensor  # before the next one is made


def _header_limit(num_tensors: int) -> int:
    return _HEADER_BYTES + _HEADER_BYTES_PER_TENSOR * num_tensors


def check_sizes(source: LessonFile) -> None:
    """See that no part is longer than what the model's tensors could become. Raises BadInput."""
    numbers = 0
    packed = 0
    for dtype, shape in source.manifest.model.tensors.values():
        count = 1
        for length in shape:
            count *= length
        numbers += sum(xor.max_packed_bytes(n) + 4 for _, n in spans(4 * count))
        packed += sum(xor.max_packed_bytes(n) + 4 for _, n in spans((4 if dtype == "float32" else 2) * count))
    head = _header_limit(len(source.manifest.model.tensors))
    limits: dict[PartName, int] = {
        "delta.safetensors": packed + head,
        "difference.safetensors": numbers + head,
        "update.safetensors": numbers + head,
    }
    for name, limit in limits.items():
        part = source.manifest.parts.get(name)
        if part is not None and part.nbytes > limit:
            raise BadInput(
                f"{source.path}: {name} has {part.nbytes:,} bytes; of this model it has at most {limit:,}",
                "get the file again",
            )
