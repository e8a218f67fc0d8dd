"""Pages about histories of audits: what is on top, numbers and where they come from, many audits and one."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
from audited import BLOCKS, audits, many_audits, trained_problem
from pages import check_page, number_of, parse, rows_of

import disthess
from disthess.audits.history import History
from disthess.audits.record import Alert, AuditRecord, Estimate
from disthess.reports.history_page import history_page
from disthess.reports.render import to_html


@pytest.fixture(scope="module")
def records() -> list[AuditRecord]:
    return audits(6, every=60)


@pytest.fixture(scope="module")
def text(records: list[AuditRecord]) -> str:
    return to_html(history_page(records))


def lean(records: list[AuditRecord]) -> list[AuditRecord]:
    """Without what takes long to draw."""
    few = [tuple(e for e in record.estimates if e.metric in ("loss", "lambda_max")) for record in records]
    return [dataclasses.replace(r, arrays={}, blocks=(), estimates=e) for r, e in zip(records, few, strict=True)]


def test_the_numbers_are_those_of_the_latest_dense_hessian(text: str) -> None:
    page = check_page(text)
    values = np.linalg.eigvalsh(np.asarray(disthess.reference_hessian(trained_problem(300))))
    assert number_of(page, "largest eigenvalue") == pytest.approx(values[-1], rel=1e-10)
    assert number_of(page, "smallest eigenvalue") == pytest.approx(values[0], rel=1e-8)
    assert number_of(page, "Frobenius norm") == pytest.approx(np.linalg.norm(values), rel=1e-10)
    assert number_of(page, "learning-rate limit") == pytest.approx(2 / values[-1], rel=1e-10)


def test_numbers_lead_to_how_they_were_computed(text: str) -> None:
    page = parse(text)
    latest = next(section for section in page.all("section") if section.attributes["id"] == "latest")
    targets = {link.attributes["href"][1:] for link in latest.all("a")}
    entries = {article.attributes["id"]: article.text for article in page.all("article")}
    assert targets
    assert targets <= set(entries)
    trace = entries["how-trace"]
    assert "Hutch++ with 48 products." in trace
    assert "95 % interval" in trace
    assert "67 Hessian-vector products" in trace
    assert "Sum of the eigenvalues of H." in trace


def test_an_interval_is_shown_with_its_confidence_and_drawn(text: str) -> None:
    page = parse(text)
    card = next(d for d in page.all("div") if len(d.all("dt")) == 1 and d.all("dt")[0].text == "trace")
    assert "±" in card.text
    assert "95 % interval" in card.text


def test_alerts_are_on_top_with_audit_rule_and_message(records: list[AuditRecord], text: str) -> None:
    page = parse(text)
    alarmed = [record for record in records if record.alerts]
    assert alarmed, "the rule must be broken somewhere"
    assert records[-1].alerts == ()
    top = page.all("header")[0].text
    assert f"{len(alarmed)} alert{'s' if len(alarmed) > 1 else ''} in {len(alarmed)} earlier audit" in top
    rows = rows_of(page, "alert-table")
    assert len(rows) == len(alarmed)
    assert rows[0][0] == f"step {alarmed[-1].step}"
    assert rows[0][2] == "sharpness"
    assert rows[0][-1] == alarmed[-1].alerts[0].message


def test_the_latest_alert_is_said_in_full_on_top(records: list[AuditRecord]) -> None:
    *before, latest = lean(records)
    alert = Alert("flat", "trace", BLOCKS[1], 1.0, 0.5, "trace is 1, allowed 0.5")
    page = check_page(to_html(history_page([*before, dataclasses.replace(latest, alerts=(alert,))])))
    top = page.all("header")[0].text
    assert "1 alert in the latest audit." in top
    assert "flat: trace is 1, allowed 0.5" in " ".join(top.split())


def test_courses_mark_alerts_and_say_what_is_to_be_seen(text: str, records: list[AuditRecord]) -> None:
    page = parse(text)
    words = {svg.all("title")[0].text: svg.all("desc")[0].text for svg in page.all("svg")}
    seen = words["largest eigenvalue over training"]
    highest = max(records, key=lambda record: record.value("lambda_max"))
    assert f"highest {highest.value('lambda_max'):.3g}"[:11] in seen
    assert f"at step {highest.step}" in seen
    assert "with alerts" in seen
    drawing = next(svg for svg in page.all("svg") if svg.all("title")[0].text.startswith("largest eigenvalue"))
    assert any("var(--alert)" in e.attributes.get("style", "") for e in drawing.everything())
    other = next(svg for svg in page.all("svg") if svg.all("title")[0].text.startswith("gradient norm"))
    assert not any("var(--alert)" in e.attributes.get("style", "") for e in other.all("use"))


def test_one_audit_has_no_courses_and_says_so(records: list[AuditRecord]) -> None:
    page = check_page(to_html(history_page(records[:1])))
    assert "courses begin with the second" in page.text
    assert not [svg for svg in page.all("svg") if "over training" in svg.all("title")[0].text]
    assert "No alerts." in page.all("header")[0].text


def test_no_audit_gives_a_page_that_says_so() -> None:
    assert "No audits yet." in check_page(to_html(history_page([]))).text


def test_the_same_records_give_the_same_bytes(records: list[AuditRecord], text: str) -> None:
    assert to_html(history_page(list(records))) == text


def test_five_hundred_audits_with_three_hundred_blocks_stay_small() -> None:
    text = to_html(history_page(many_audits(500, blocks=300)))
    assert len(text.encode()) < 3_000_000
    page = check_page(text)
    assert len(rows_of(page, "audit-table")) == 500
    assert len(rows_of(page, "block-table")) == 300


def test_audits_are_in_the_order_of_training_however_they_were_appended(records: list[AuditRecord]) -> None:
    few = lean(records)
    assert to_html(history_page([few[3], *few[:3], *few[4:]])) == to_html(history_page(few))


def test_without_steps_dates_are_the_axis_and_without_dates_numbers(records: list[AuditRecord]) -> None:
    dated = [dataclasses.replace(record, step=None) for record in lean(records[:3])]
    assert ">date<" in to_html(history_page(dated))
    bare = [dataclasses.replace(record, taken="some day") for record in dated]
    assert ">audit<" in to_html(history_page(bare))


def test_given_names_are_escaped_everywhere(records: list[AuditRecord]) -> None:
    evil = '<script>alert("x")</script>&\'$a_b$ --> ]]> \x07'
    names = (evil, *BLOCKS[1:])
    odd = dataclasses.replace(
        records[-1],
        checkpoint=evil,
        facts={evil: evil},
        blocks=names,
        estimates=(*records[-1].estimates, Estimate("trace", evil, 1.0, 0.9, 1.2, 0.95, evil)),
        alerts=(Alert(evil, "lambda_max", evil, 1.0, 0.5, evil),),
        arrays={**records[-1].arrays, f"tile/{evil}": np.eye(3)},
    )
    text = to_html(history_page([*records[:2], odd], title=evil))
    assert "<script" not in text
    page = check_page(text)
    assert '<script>alert("x")</script>' in page.text
    assert '<script>alert("x")' in page.all("h1")[0].text


def test_what_is_not_defined_is_a_dash_and_leaves_a_gap(records: list[AuditRecord]) -> None:
    def without(record: AuditRecord) -> AuditRecord:
        changed = tuple(
            dataclasses.replace(e, value=math.nan, low=math.nan, high=math.inf) if e.metric == "frobenius" else e
            for e in record.estimates
            if e.metric != "rate_limit"
        )
        return dataclasses.replace(record, estimates=changed, arrays={}, blocks=())

    page = check_page(to_html(history_page([records[0], without(records[1]), records[2], without(records[3])])))
    words = {svg.all("title")[0].text: svg.all("desc")[0].text for svg in page.all("svg")}
    assert "measured in 2 of 4 audits" in words["Frobenius norm over training"]
    assert "measured in 2 of 4 audits" in words["learning-rate limit over training"]
    card = next(d for d in page.all("div") if len(d.all("dt")) == 1 and d.all("dt")[0].text == "Frobenius norm")
    assert "–" in card.text
    assert re.search(r"\bnan\b", page.text, re.IGNORECASE) is None


def test_the_coupling_map_answers_with_its_intervals(text: str, records: list[AuditRecord]) -> None:
    coupling = np.asarray(records[-1].arrays["coupling/value"])
    off = np.triu(coupling, 1)
    page = parse(text)
    assert "May these blocks be treated as independent? No: the strongest pair is" in page.text
    rows = rows_of(page, "pairs")
    i, j = np.unravel_index(np.argmax(off), off.shape)
    assert rows[0][:2] == [BLOCKS[i], BLOCKS[j]]
    assert float(rows[0][2].split()[0]) == pytest.approx(off.max(), rel=1e-2)


def test_what_changed_between_audits_is_listed(records: list[AuditRecord]) -> None:
    few = lean(records)
    later = [dataclasses.replace(record, facts={**record.facts, "torch": "2.14"}) for record in few[3:]]
    page = check_page(to_html(history_page([*few[:3], *later])))
    assert rows_of(page, "changes") == [["step 180", "torch", "2.13", "2.14"]]


def test_a_history_on_disk_gives_the_same_page(tmp_path: Path, records: list[AuditRecord]) -> None:
    history = History.open_or_create(tmp_path / "audits.zarr")
    for record in records[:2]:
        history.append(record)
    out = disthess.report(tmp_path / "audits.zarr", tmp_path / "sub" / "page.html", title="Training")
    found = out.read_text(encoding="utf-8")
    check_page(found)
    expected = to_html(history_page(records[:2], "Training", place=str(history.path)))
    assert found == expected
