# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
import base64
import copy
import re
import struct
from html.parser import HTMLParser

import pytest
from conftest import REFERENCE_LOGS

from unlearn_eval.report import write_report
from unlearn_eval.report_numbers import FORGET, KEEP, draw
from unlearn_eval.results import read_log


SECRET = "Zorblax"
FILES = ["REPORT.html", "REPORT.md", "REPORT.png"]


def metric(agg_value, n=2):
    return {"agg_value": agg_value, "value_by_index": {str(i): {"prob": agg_value} for i in range(n)}}


def rouge(agg_value):
    texts = {"input": f"Who is {SECRET}?", "ground_truth": f"{SECRET} is a poet.", "generation": f"{SECRET}, a poet"}
    item = {"rouge1_recall": agg_value, "rougeL_f1": agg_value, "rougeL_recall": agg_value, **texts}
    return {"agg_value": agg_value, "value_by_index": {"0": item, "1": item}}


def metadata(model, **change):
    return {
        "model": model,
        "forget_split": "own data",
        "question_key": "question",
        "max_samples": None,
        "num_questions": {"forget": 2, "retain": 5, "holdout": 3},
        "backend": "vllm",
        "score_backend": "transformers",
        "compat": None,
        "dtype": "bfloat16",
        "quantization": None,
        "date": "2026-11-25T10:00:00+00:00",
        "versions": {"torch": "2.8.0", "vllm": "0.22.1"},
        "seeds": {"seed": 0},
        "hashes": {"weights": "ab" * 32, "data": "cd" * 32, "template": "ef" * 32},
    } | change


@pytest.fixture
def before():
    return {
        "metadata": metadata("full"),
        "forget_Q_A_Prob": metric(0.9),
        "forget_Q_A_ROUGE": rouge(0.8),
        "extraction_strength": {"agg_value": 0.75},
        "exact_memorization": {"agg_value": 0.95},
        "mia_min_k": {"agg_value": 1.0},
        "privleak": {"agg_value": -100.0},
        "retain_Q_A_Prob": metric(0.8, 5),
        "retain_Q_A_ROUGE": {"agg_value": 0.7},
        "model_utility": {"agg_value": None, "reason": "needs real authors and world facts."},
        "forget_quality": {"agg_value": None, "reason": "needs the retain-only model's log"},
    }


@pytest.fixture
def after(before):
    log = copy.deepcopy(before)
    hashes = {"weights": "ab" * 32, "adapter": "09" * 32, "data": "cd" * 32, "template": "ef" * 32}
    log["metadata"] = metadata("rkld", adapter_of="full", date="2026-11-25T11:00:00+00:00", hashes=hashes)
    new = {
        "forget_Q_A_Prob": 0.15,
        "forget_Q_A_ROUGE": 0.4,
        "retain_Q_A_Prob": 0.8,
        "mia_min_k": 0.5,
        "privleak": 1e-5,
    }
    for name, value in new.items():
        log[name]["agg_value"] = value
        for item in log[name].get("value_by_index", {}).values():
            item |= {"prob": value} if "prob" in item else {"rougeL_recall": value}
    return log


class Page(HTMLParser):
    """A strict reading of a page: every tag closed in order, no entity left open; tables as lists of texts."""

    VOID = {"meta", "img"}

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.rows, self.texts, self.images = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)) and not any(name.startswith("on") for name in names)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        self.texts.append(data)

    def row(self, start):
        return next(row for row in self.rows if row[0].startswith(start))

    @property
    def text(self):
        return "".join(self.texts)


def report(folder, before, after):
    paths = write_report(folder, before, after)
    assert sorted(path.name for path in paths) == sorted(path.name for path in folder.iterdir()) == FILES
    return (folder / "REPORT.md").read_text(), Page((folder / "REPORT.html").read_text())


def test_contents(tmp_path, before, after):
    markdown, page = report(tmp_path / "new", before, after)
    assert page.row("Probability of the answer (forget_Q_A_Prob)")[1:4] == ["0.900", "0.150", "lower"]
    assert page.row("Words given back (forget_Q_A_ROUGE)")[1:4] == ["0.800", "0.400", "lower"]
    assert page.row("Success of an attack (mia_min_k)")[1:4] == ["1.000", "0.500", "near 0.5"]
    assert page.row("Privacy leakage, in % (privleak)")[1:4] == ["-100.0", "1.0e-05", "near 0"]
    assert page.row("Words given back (retain_Q_A_ROUGE)")[1:4] == ["0.700", "0.700", "higher"]
    assert page.row("Model") == ["Model", "full", "rkld"]
    assert page.row("Date") == ["Date", "2026-11-25T10:00:00+00:00", "2026-11-25T11:00:00+00:00"]
    assert page.row("Adapter on") == ["Adapter on", "none", "full"]
    assert page.row("weights") == ["weights", "ab" * 32, "the same"]
    assert page.row("adapter") == ["adapter", "none", "09" * 32]
    assert not any("model_utility" in row[0] or "forget_quality" in row[0] for row in page.rows)
    for text in (
        "Token by token, the answers to be forgotten are now 6 times less likely (mean probability 0.900 before, 0.150 "
        "after); the answers to be kept are now as likely as before (mean probability 0.800 before, 0.800 after). Still "
        "above half of their probability before: 0 of 2 answers to be forgotten; the likeliest is at 0.150. Asked, the "
        "model gives back 40.0 % of the words of the answers to be forgotten (before: 80.0 %).",
        "Questions: 2 to be forgotten, 5 to be kept, 3 never seen;",
        "Decoding: greedy",
        "Answers generated by: vllm",
        "Precision: bfloat16",
        "None: quantisation, compatibility mode.",
        "forget_quality (needs the retain-only model's log)",
        "retain_utility (needs retain_Truth_Ratio)",
        "model_utility (needs real authors and world facts).",
        "not a proof",
        "backups, earlier checkpoints, optimiser states",
        "an adapter on full: switching it off undoes the unlearning, unless it is merged",
    ):
        assert text in page.text
        assert text in re.sub(r"\\(.)", r"\1", markdown)
    assert "in the same way" not in page.text
    (image,) = page.images
    assert "Probability of the answer 0.900 to 0.150" in image["alt"]
    png = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
    assert png == (tmp_path / "new" / "REPORT.png").read_bytes()
    assert struct.unpack(">I", png[16:20]) == (1400,), "7 inches at 200 dpi"
    assert "](REPORT.png)" in markdown


def test_nothing_outside_the_page_is_needed(tmp_path, before, after):
    _, page = report(tmp_path / "new", before, after)
    text = (tmp_path / "new" / "REPORT.html").read_text()
    assert text.startswith("<!DOCTYPE html>") and not {"link", "script", "iframe"} & set(page.tags)
    assert not re.search(r"https?://|url\(|@import", text)
    for tag in ("html", "head", "title", "body", "h1"):
        assert page.tags.count(tag) == 1


def test_no_text_of_a_record(tmp_path, before, after):
    write_report(tmp_path / "new", before, after)
    for name in FILES[:2]:
        assert SECRET not in (tmp_path / "new" / name).read_text()


def test_names_are_escaped(tmp_path, before, after):
    name = "<b>m|o*d</td>&amp;[x](y)\n# `e`\"l'"
    after["metadata"] |= {"model": name, "adapter_of": name, "dtype": "<i>"}
    after["forget_quality"]["reason"] = "<script>"
    markdown, page = report(tmp_path / "new", before, after)
    assert not {"b", "i", "script"} & set(page.tags)
    assert page.row("Model")[2] == name and page.row("Precision")[2] == "<i>"
    assert "<b>" not in markdown and "<script>" not in markdown and "\n# `" not in markdown
    (line,) = [line for line in markdown.splitlines() if line.startswith("| Model ")]
    assert len(re.findall(r"(?<!\\)\|", line)) == 4, "a name does not open a column"
    assert r"\[x\](y)" in line


def test_same_logs_same_bytes(tmp_path, before, after):
    first, second = (write_report(tmp_path / name, before, after) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (0.2, 0.5, "forgotten are now 2.5 times more likely"),
        (0.9, 0.0, "forgotten are now less likely (mean probability 0.900 before, 0.000 after)"),
        (0.9, 0.9 / 12345, "forgotten are now 12,345 times less likely"),
        (0.5, 0.4999, "forgotten are now as likely as before"),
        (0.0, 0.0, "forgotten are now as likely as before"),
    ],
)
def test_verdict(tmp_path, before, after, old, new, sentence):
    for log, value in ((before, old), (after, new)):
        log["forget_Q_A_Prob"]["agg_value"] = value
    _, page = report(tmp_path / "new", before, after)
    assert sentence in page.text


@pytest.mark.parametrize(
    ("old", "p", "says"),
    [
        (None, 0.0499, "still tells the model from one that never saw them (p = 0.050, line at 0.05)"),
        (0.0499, 0.05, "no longer tells the model from one that never saw them (p = 0.050, before: 0.050"),
        (
            0.05,
            0.3,
            "says nothing: it did not tell even the model before from one that never saw them (p = 0.050, after: 0.3",
        ),
        (None, 0.3, "says nothing: it is not known to have told even the model before"),
    ],
)
def test_forget_quality_in_the_verdict(tmp_path, before, after, old, p, says):
    """Three questions can't tell any two models apart."""
    after["forget_quality"] = {"agg_value": p}
    if old is not None:
        before["forget_quality"] = {"agg_value": old}
    _, page = report(tmp_path / "new", before, after)
    assert f"A test on the answers to be forgotten {says}" in page.text
    if old is not None:
        return
    assert page.row("Forget quality")[1] == "–"
    assert "forget_quality (before: needs the retain-only model's log)" in page.text


def test_those_who_are_remembered_are_counted(tmp_path, before, after):
    """A mean of 0.4 may hide one answer of two that is known as before."""
    for log, values in ((before, (0.8, 0.9)), (after, (0.4, 0.75))):
        log["forget_Q_A_Prob"]["value_by_index"] = {str(i): {"prob": value} for i, value in enumerate(values)}
    after["forget_Q_A_ROUGE"]["not_read"] = 1
    _, page = report(tmp_path / "new", before, after)
    assert "half of their probability before: 1 of 2 answers to be forgotten; the likeliest is at 0.750" in page.text
    assert (
        "Words given back: of the answers to be forgotten, 1 can not be read (other letters than a to z) and count as 0"
        in page.text
    )


def test_other_settings_are_said(tmp_path, before, after):
    after["metadata"] |= {"quantization": "nf4", "score_backend": "vllm"}
    after["metadata"]["hashes"]["template"] = "11" * 32
    _, page = report(tmp_path / "new", before, after)
    assert "Not measured in the same way (answers scored by, quantisation, chat template)" in page.text
    assert page.row("Quantisation") == ["Quantisation", "none", "nf4"]


def test_little_in_common(tmp_path, before, after):
    """One panel, no verdict, nothing recorded."""
    old, new = ({"extraction_strength": log["extraction_strength"]} for log in (before, after))
    _, page = report(tmp_path / "new", old, new)
    assert "are not summed up" in page.text and "The logs hold none." in page.text
    assert page.row("Model") == ["Model", "not recorded", "not recorded"]
    assert "exact_memorization (not in the log)" in page.text
    assert "Where the unlearning is an adapter" in page.text


@pytest.mark.parametrize("forget", [0, 1, 4])
def test_picture(forget):
    """Labels inside the page, panels apart, both dots of each number where they belong."""
    drawn = [*[number for number in FORGET if number.drawn][:forget], *KEEP]
    values = {number.metric: (None, None) for number in (*FORGET, *KEEP)}
    values |= {number.metric: (0.9, i / 10) for i, number in enumerate(drawn)}
    figure = draw(values)
    figure.canvas.draw()
    legend = figure.legends[0].get_window_extent()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert legend.y1 <= min(box.y0 for box in boxes)
    assert all(left.x1 <= right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
    for box in (legend, *boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    dots = [line for axes in figure.axes for line in axes.lines if line.get_marker() == "o"]
    assert [float(dot.get_xdata()[0]) for dot in dots] == [x for i in range(len(drawn)) for x in (0.9, i / 10)]
    assert {(dot.get_label(), dot.get_markerfacecolor()) for dot in dots} == {("before", "white"), ("after", "black")}


def test_faults_write_nothing(tmp_path, before, after):
    def changed(log, **change):
        return copy.deepcopy(log) | change

    data = metadata("rkld", hashes={"data": "00" * 32})
    empty = {"forget_Q_A_Prob": {"agg_value": None}, "model_utility": {"agg_value": None}}
    broken = copy.deepcopy(after)
    del broken["forget_Q_A_Prob"]["value_by_index"]["0"]
    counts = {"forget": 2, "retain": 6}
    for old, new, message in (
        (empty, empty, "`before` and `after` have none of these numbers in common: forget_Q_A_Prob, .*Evaluate both"),
        (before, changed(empty, metadata=metadata("x")), "none of these numbers in common"),
        ({}, {}, "`before` has no metrics"),
        (before, broken, "`after`: forget_Q_A_Prob misses items"),
        (
            before,
            changed(after, metadata=metadata("x", forget_split="forget01")),
            "`before` is of own data and `after` of",
        ),
        (
            before,
            changed(after, metadata=metadata("x", num_questions=counts)),
            "5 questions in the retain set and `after` 6",
        ),
        (before, changed(after, metadata=data), "differ in the hash of their data: evaluate both models on the same"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            write_report(tmp_path / "new", old, new)
        assert SECRET not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_published_logs(tmp_path):
    logs = [REFERENCE_LOGS / f"Llama-3.2-1B-Instruct_{kind}_TOFU_EVAL.json" for kind in ("full_forget01", "retain99")]
    if not logs[0].is_file():
        pytest.skip(f"{logs[0]} is not there: set TRL_RKLD_SHARED")
    before, after = map(read_log, logs)
    markdown, page = report(tmp_path / "new", before, after)
    assert "now 5.45 times less likely (mean probability 0.901 before, 0.165 after)" in page.text
    assert page.row("Retain utility")[1:3] == ["0.691", "0.696"], "recomputed: not in open-unlearning's logs"
    assert "Questions: 40 to be forgotten, 400 to be kept, 100 on real authors, 117 on the world" in page.text
    assert page.row("Success of an attack")[1:3] == ["1.000", "0.471"]
    for item in before["forget_Q_A_ROUGE"]["value_by_index"].values():
        assert item["ground_truth"] not in markdown + page.text
        assert item["generation"] not in markdown + page.text
