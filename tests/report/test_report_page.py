"""The page: its structure, that nothing in a run can break out of it, and that it asks nothing of the network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report_fixture as fixture

from secondnature import report
from secondnature.errors import BadInput, BadRecord, NotFound, StorageError
from secondnature.evidence.style import style
from secondnature.records import (
    Correction,
    ErrorInfo,
    Lesson,
    Losses,
    Message,
    SampleAnswer,
    SharedWords,
    TagTest,
    to_jsonl,
)
from secondnature.report import svg
from secondnature.report.page import render
from secondnature.report.run import Run, read_run

VOID = {"meta", "br", "hr", "img", "input", "link"}
EVIL = "<script>alert(1)</script>\"'><img src=http://evil.example/x onerror=alert(2)>"


class Page(HTMLParser):
    """Checks that tags are balanced and ids unique; collects headings, text, tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.labels: list[str] = []
        self.handlers: list[str] = []
        self.headings: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in {"src", "href", "xlink:href", "action"}:
                self.links.append(value or "")
            elif name == "aria-labelledby":
                self.labels += (value or "").split()
            elif name.startswith("on"):
                self.handlers.append(name)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h3":
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag, f"</{tag}> at line {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h3":
            self.headings[-1] += data
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def checked(path: Path) -> Page:
    text = path.read_text()
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert set(page.labels) <= set(page.ids)
    assert all(link.startswith("#") for link in page.links)
    assert not page.handlers
    assert "script" not in page.tags
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?\s*(https?:)?//", text.split("</style>")[0])
    return page


def said(page: Page) -> str:
    return " ".join(" ".join(page.text).split())


def test_the_page_has_every_part_in_its_order(tmp_path: Path) -> None:
    out = report.write(fixture.listening(tmp_path), tmp_path / "report.html")
    page = checked(out)
    assert page.headings == [
        "Before and after",
        "While it learned",
        "Answers, side by side",
        "What moved",
        "How to undo",
        "Where it came from",
        "Settings",
    ]
    assert page.tags.count("svg") == 5 + 3 + 1 + 1  # probe sets, curves, heat map, KL
    text = said(page)
    for part in (
        "✓ Kept",
        "Listening rose from 5 % to 88 % of 60 held-out directions, and no guard got worse.",
        "secondnature lessons revert 0001-listening",
        "[77, 95]",
        "3 → 53 of 60: 51 gained, 1 lost",
        "mcnemar-midp/1, alpha 0.025",
        "w-3f9a1c0b7d52",
        "KL(before ‖ after) 0.75 on new prompts, 0.002 on replay prompts, nats per token",
        "self_attn.q_proj",
        "until_margin",
        "optimizer.betas",
        "You could also sort the pages by date. Shall I do that?",
    ):
        assert part in text, part
    assert text.index("Please sort the dates") < text.index("doubles a number")  # corrections first


def test_several_lessons_stand_on_one_page_with_a_summary(tmp_path: Path) -> None:
    dirs = [fixture.listening(tmp_path), fixture.overreach(tmp_path)]
    page = checked(report.write_many(dirs, tmp_path / "both.html"))
    assert page.links == ["#0001-listening", "#0002-overreach"]
    text = said(page)
    assert "2 lessons" in text
    looks = re.search(
        r"Development (\d+) of 24 \(\d+ before\), other side (\d+) of 24 \(24 before\) after 14 s", text
    )
    assert looks, text
    lost = 24 - int(looks[2])
    assert lost > 0
    assert f"{lost} of the other side passed before and fail" in text
    assert "“Yes, I will <do> that.”" in text
    assert "✕ harmed" in text
    assert "n ≥ 310 would do" in text
    assert "25 of 246" in text  # long lists end early and say so
    assert "weights are again version w-b81e6640aa19, to the byte" in text
    assert "lessons revert 0002" not in text  # it is undone already


def test_texts_of_a_run_cannot_become_markup(tmp_path: Path) -> None:
    evil_set = fixture.comparison(EVIL, "guard", 30, 20, 1, 2, passed=False)
    flips = [f.model_copy(update={"prompt": EVIL, "before": EVIL, "after": EVIL}) for f in evil_set.flips]
    evidence = fixture.evidence([evil_set.model_copy(update={"flips": flips, "note": EVIL})], sentence=EVIL)
    moved = [fixture.moved()[0].model_copy(update={"name": f"model.layers.0.{EVIL}"})]
    record = fixture.lesson("0001-evil", note=EVIL, reason=EVIL, moved=moved, settings={EVIL: {EVIL: EVIL}})
    directory = fixture.write_run(tmp_path, record, evidence)
    said_it = [Message(role="assistant", content=EVIL)]
    bad = Correction(prompt=[Message(role="user", content=EVIL)], chosen=said_it, rejected=said_it)
    (directory / "corrections.jsonl").write_text(to_jsonl([bad]))
    (directory / "answers.jsonl").write_text(
        to_jsonl([SampleAnswer(prompt=bad.prompt, before=EVIL, after=EVIL)])
    )
    out = report.write(directory, tmp_path / "evil.html")
    page = checked(out)
    assert "img" not in page.tags
    assert "".join(page.text).count(EVIL) >= 10  # shown as it is


def test_a_lesson_without_probes_says_that_nothing_is_claimed(tmp_path: Path) -> None:
    record = fixture.lesson("0003-bare", state="on_trial", moved=[], settings={}, verdict=None)
    directory = tmp_path / "bare"
    directory.mkdir()
    (directory / "lesson.json").write_text(record.model_dump_json())
    page = checked(report.write(directory, tmp_path / "bare.html"))
    assert page.headings == ["Before and after", "How to undo", "Where it came from"]
    assert "nothing is claimed" in said(page)
    assert "secondnature lessons keep 0003-bare" in said(page)


@pytest.mark.parametrize("state", ["queued", "running", "on_trial", "kept", "undone", "failed", "cancelled"])
def test_every_state_has_a_verdict_in_words(tmp_path: Path, state: str) -> None:
    error = ErrorInfo(type="NonFinite", message="The loss was NaN at step 3.") if state == "failed" else None
    directory = fixture.write_run(tmp_path, fixture.lesson("0004-state", state=state, error=error), None)
    text = said(checked(report.write(directory, tmp_path / "state.html")))
    marks = {"kept": "✓ Kept", "undone": "✕ Undone", "failed": "✕ Failed", "cancelled": "– Cancelled"}
    assert marks.get(state, "…") in text
    assert ("The loss was NaN at step 3." in text) == (state == "failed")
    assert ("lessons revert" in text) == (state in {"kept", "on_trial"})


def test_inconclusive_is_its_own_verdict(tmp_path: Path) -> None:
    evidence = fixture.evidence([], verdict="inconclusive", sentence="Too few probes: n >= 300 would do.")
    directory = fixture.write_run(tmp_path, fixture.lesson("0005-few", state="undone"), evidence)
    assert "? Inconclusive" in said(checked(report.write(directory, tmp_path / "few.html")))


def test_huge_runs_stay_readable_and_the_json_keeps_all(tmp_path: Path) -> None:
    big = fixture.comparison("code", "guard", 1000, 900, 0, 500, passed=False)
    flips = [f.model_copy(update={"before": "<" * 3_000}) for f in big.flips]
    sets = [big.model_copy(update={"flips": flips, "name": f"code{i}"}) for i in range(3)]
    record = fixture.lesson("0006-huge", moved=fixture.moved(64))
    directory = fixture.write_run(tmp_path, record, fixture.evidence(sets))
    lines = [{"kind": "step", "step": i, "loss": 1 / (i + 1)} for i in range(4_000)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    out = report.write(directory, tmp_path / "huge.html")
    checked(out)
    assert out.stat().st_size < 2_000_000
    kept = report.ReportData.model_validate_json(out.with_suffix(".json").read_bytes())
    assert kept.runs == [report.read_run(directory)]
    assert kept.runs[0].evidence is not None
    assert len(kept.runs[0].evidence.comparisons[0].flips) == 500


def test_the_same_run_gives_the_same_bytes_and_the_json_reads_back(tmp_path: Path) -> None:
    directory = fixture.listening(tmp_path)
    first = report.write(directory, tmp_path / "a" / "report.html")
    second = report.write(directory, tmp_path / "b" / "report.html")
    assert first.read_bytes() == second.read_bytes()
    assert sorted(p.name for p in first.parent.iterdir()) == ["report.html", "report.json"]
    data = report.ReportData.model_validate_json(first.with_suffix(".json").read_bytes())
    assert data == report.ReportData(runs=[report.read_run(directory)])


def test_values_that_are_not_finite_are_left_out_of_the_curves(tmp_path: Path) -> None:
    directory = fixture.write_run(tmp_path, fixture.lesson("0007-nan", state="failed"), None)
    lines = '{"kind":"step","step":1,"loss":2.0}\n{"kind":"step","step":2,"loss":NaN}\n'
    (directory / "metrics.jsonl").write_text(lines)
    text = said(checked(report.write(directory, tmp_path / "nan.html")))
    assert "From 2 to 2 in 1 step." in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 3}', "line 2: no `kind`"),
        ('{"kind": "step", "loss": 1.0}', "line 2: `step` is missing"),
    ],
)
def test_a_broken_metric_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    directory = fixture.listening(tmp_path)
    (directory / "metrics.jsonl").write_text('{"kind":"step","step":1,"loss":1.0}\n' + line + "\n")
    with pytest.raises(BadRecord, match=r"metrics\.jsonl") as caught:
        report.write(directory, tmp_path / "report.html")
    assert message in caught.value.message
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("line", [b"{broken", b"\xff\xfe\0", b"[1]", b"1" * 5000])
def test_a_metric_line_that_a_power_loss_garbled_is_passed_over(tmp_path: Path, line: bytes) -> None:
    directory = fixture.listening(tmp_path)
    step = b'{"kind":"step","step":%d,"loss":1.0,"of_a_newer_version":1}\n'
    (directory / "metrics.jsonl").write_bytes(step % 1 + line + b"\n" + step % 2 + line)
    metrics = read_run(directory).metrics
    assert [s.step for s in metrics.steps] == [1, 2]
    assert metrics.num_skipped == 2
    checked(report.write(directory, tmp_path / "report.html"))


def test_bad_directories_and_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no lesson\.json"):
        report.write(tmp_path, tmp_path / "report.html")
    directory = fixture.listening(tmp_path)
    with pytest.raises(BadInput, match=r"ends in \.html"):
        report.write(directory, tmp_path / "report.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        report.write(directory, tmp_path / "file" / "report.html")
    newer = json.loads((directory / "lesson.json").read_text()) | {"schema_version": 99}
    (directory / "lesson.json").write_text(json.dumps(newer))
    with pytest.raises(BadRecord, match="schema_version 99"):
        report.write(directory, tmp_path / "report.html")


def test_moved_is_read_from_the_metrics_where_the_lesson_has_none(tmp_path: Path) -> None:
    record: Lesson = fixture.lesson("0008-moved", moved=[], state="cancelled")
    directory = fixture.write_run(tmp_path, record, None)
    line = {"kind": "moved", "tensor": "h.2.mlp.c_fc.weight", "layer": 2, "intended": 0.1, "relative": 0.002}
    (directory / "metrics.jsonl").write_text(json.dumps(line | {"written": 0.2}) + "\n")
    text = said(checked(report.write(directory, tmp_path / "moved.html")))
    assert "mlp.c_fc, layer 2, by 2 ‰" in text


def test_ticks_are_round_and_cover_the_data() -> None:
    assert svg.ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    for low, high in ((-6.2, 5.1), (0.351, 0.353), (0.0, 0.0), (-1e4, 3.0)):
        found = svg.ticks(low, high)
        assert found[0] <= low
        assert found[-1] >= high
        assert 3 <= len(found) <= 8


def test_thinning_keeps_spikes() -> None:
    points = [(float(i), 50.0 if i == 777 else 0.1 * (i % 3)) for i in range(10_000)]
    kept = svg.thin(points, 300)
    assert len(kept) <= 300
    assert (777.0, 50.0) in kept
    assert kept == sorted(kept)


def test_what_would_steer_or_reorder_is_visible_on_the_page_and_in_the_table(tmp_path: Path) -> None:
    evil = "before \x1b]52;c;cm0=\x07 \x9b2A \u202etxt.exe\u2066"
    directory = fixture.write_run(tmp_path, fixture.lesson("0009-odd", note=evil), None)
    odd = SampleAnswer(prompt=[Message(role="user", content=evil)], before=evil, after=evil)
    (directory / "answers.jsonl").write_text(to_jsonl([odd]))
    page = report.write(directory, tmp_path / "odd.html").read_text()
    for steering in "\x1b\x07\x9b\u202e\u2066":
        assert steering not in page
    assert "before ␛]52;c;cm0=␇ \\u009b2A \\u202etxt.exe" in page
    sets = [fixture.comparison(evil, "guard", 40, 20, 0, 0, passed=True)]
    assert "\x1b" not in report.markdown_table(fixture.evidence(sets))


def test_what_losses_share_and_how_answers_sound_is_on_the_page() -> None:
    guard = fixture.comparison("code", "guard", n=300, before=300, gains=0, losses=5, passed=False)
    tag = TagTest(
        tag="refund",
        n=5,
        before=5,
        gains=0,
        losses=5,
        p=5e-11,
        p_adjusted=5e-11,
        harm_p=0.016,
        harm_alpha=0.025,
        harmed=True,
    )
    words = SharedWords(words="my money", before=7, losses=5, p=1e-9, p_adjusted=1e-6)
    lost = Losses(before=300, gains=0, losses=5, tags=[tag], shared=[words], num_sequences=1000)
    sound = style(["One two three."] * 4, ["Three."] * 4)
    found = guard.model_copy(update={"lost": lost, "style": sound})
    run = Run(
        lesson=fixture.lesson("0001-x"),
        evidence=fixture.evidence([found], verdict="undone", sentence="Undone."),
    )
    page = Page(render([run]))
    text = " ".join(page.text)
    assert "of 5 losses in code, 5 are tagged refund (5 of its 5 probes; p < 0.0001)" in text
    assert "5 have “my money” (5 of 7 probes that have it" in text
    assert "How the answers sound" in text
    assert "3 → 1 words an answer (4 shorter, 0 longer" in text
