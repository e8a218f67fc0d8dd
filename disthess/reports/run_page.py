"""The page about one run: what its store holds, and how far it can be trusted."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from disthess import __version__
from disthess.reduce.certify import Certificate
from disthess.reduce.hessian_store import HessianStore
from disthess.reports.numerals import cell, count, number, share
from disthess.reports.page import Cell, Column, Facts, Figures, Page, Section, Table, Text, Verdict
from disthess.reports.run_findings import RunFindings
from disthess.reports.run_tables import (
    activation_section,
    block_section,
    kink_section,
    spectrum_section,
)
from disthess.units import human_bytes, human_flops, human_seconds

_MOST_TILES = 50
_NAMES = {"hessian": "Hessian", "ggn": "Gauss-Newton part", "residual": "residual part"}


def run_page(store: HessianStore, found: RunFindings, title: str | None = None, top: int = 10) -> Page:
    """The page.

    Args:
        store: Whose.
        found: What was read and computed.
        title: Above it; default the run's own.
        top: Rows of tables of the largest.
    """
    certificates: dict[str, Certificate | None] = {part: store.certificate(part) for part in store.parts}
    if store.activations:
        certificates["activations"] = store.certificate("activations")
    sections = [
        _glance(store, found),
        spectrum_section(found, top),
        block_section(store, found, top),
        _ggn(found),
        kink_section(store),
        activation_section(store, found),
        _certificates(certificates),
        _tiles(store, found),
        _what(store),
    ]
    name = str(store.attributes.get("title") or "run")
    return Page(
        title or name,
        f"disthess report of a run: {', '.join(_NAMES[part] for part in store.parts)}",
        _verdicts(store, found, certificates),
        tuple(section for section in sections if section is not None),
        f"Written by disthess {__version__} from the store {store.path}. Every number is in the objective's own scale.",
    )


def _verdicts(
    store: HessianStore, found: RunFindings, certificates: dict[str, Certificate | None]
) -> tuple[Verdict, ...]:
    made = []
    total = len(store.layout.tiles)
    held = store.store.quarantined()
    if found.missing:
        why = f" {len(held)} of them failed for good; see Tiles and cost." if held else ""
        made.append(
            Verdict(
                "warning",
                "Unfinished.",
                f"{len(found.missing)} of {total} tiles are missing, so that there are no numbers of the whole yet.{why} Run "
                "the same again to resume.",
            )
        )
    elif not store.store.is_reduced():
        made.append(Verdict("warning", "Unfinished.", "All tiles are there; run the same again for what follows them."))
    else:
        made.append(_trust(certificates))
    if found.left_out:
        made.append(
            Verdict("plain", "Left out,", "because it would take long:", tuple(Cell(text) for text in found.left_out))
        )
    return tuple(made)


def _trust(certificates: dict[str, Certificate | None]) -> Verdict:
    failed = [part for part, entry in certificates.items() if entry is not None and not entry.passed]
    without = [part for part, entry in certificates.items() if entry is None]
    passed = [entry for entry in certificates.values() if entry is not None and entry.passed]
    if failed:
        return Verdict(
            "bad", "Not to be used.", f"The certificate failed for {', '.join(failed)}; see Certificate for the errors."
        )
    if not passed:
        return Verdict("warning", "Complete, without a certificate.", "Nothing independent was compared with it.")
    worst = max(passed, key=lambda entry: entry.worst / entry.tolerance)
    text = (
        f"Against {worst.against}, the worst relative error over {worst.vectors} random vectors is {number(worst.worst, 2)} "
        f"(allowed {number(worst.tolerance, 1)})."
    )
    if without:
        return Verdict("warning", "Certified in part.", f"{text} Without a certificate: {', '.join(without)}.")
    return Verdict("good", "Certified.", text)


def _glance(store: HessianStore, found: RunFindings) -> Section:
    rows: list[tuple[str, Cell]] = [("parameters", Cell(count(store.numel), float(store.numel)))]
    if found.loss is not None:
        rows.append(("loss", cell(found.loss, 6)))
    if found.gradient_norm is not None:
        rows.append(("gradient norm", cell(found.gradient_norm)))
    largest, smallest = found.largest, found.smallest
    if found.pairs is not None and largest is not None and smallest is not None:
        at = [int(np.argmax(found.pairs.values)), int(np.argmin(found.pairs.values))]
        for name, value, place in zip(("largest eigenvalue", "smallest eigenvalue"), (largest, smallest), at):
            residual = f"± {number(float(found.pairs.residuals[place]), 2)} (residual)"
            rows.append((name, cell(value, 5, link="eigenvalues", note=residual)))
    if largest is not None and largest > 0 and found.part == "hessian":
        rows.append(("learning-rate limit 2 / λmax", cell(2 / largest, note="of gradient descent")))
    if found.blocks is not None:
        norm, trace = found.blocks.frobenius, found.blocks.trace
        rows += [("trace", cell(trace, 5, note="exact")), ("Frobenius norm", cell(norm, 5, note="exact"))]
        if norm > 0:
            rows.append(("effective rank", cell(trace**2 / norm**2, note="trace² / |H|²")))
            if largest is not None and smallest is not None:
                size = max(abs(largest), abs(smallest))
                rows.append(("stable rank", cell(norm**2 / size**2, note="|H|² / |H|₂²")))
    if found.negative is not None:
        how = "counted" if found.negative.exact else "estimated, no interval"
        note = f"{how}; below −{number(found.negative.tolerance, 2)}"
        rows.append(("negative eigenvalues", Cell(share(found.negative.share), found.negative.share, note=note)))
    if found.ggn_share is not None:
        rows.append(("GGN share", Cell(share(found.ggn_share), found.ggn_share, "gauss-newton", "of the trace")))
    return Section("glance", "At a glance", (Figures(tuple(rows)),))


def _ggn(found: RunFindings) -> Section | None:
    if found.definite is None and found.ggn_trace is None:
        return None
    rows = []
    if found.definite is not None:
        entry = found.definite
        rows += [
            ("verdict", Cell(entry.verdict, tone="bad" if entry.verdict == "indefinite" else "plain")),
            ("smallest eigenvalue", cell(entry.smallest, note=f"residual {number(entry.residual, 2)}")),
            ("largest eigenvalue", cell(entry.largest)),
            ("rounding", cell(entry.tolerance, 2, note="how far below zero rounding alone may put an eigenvalue")),
        ]
    if found.ggn_trace is not None:
        rows.append(("trace", cell(found.ggn_trace, 5)))
    if found.ggn_share is not None:
        formula = "tr G / (|tr G| + |tr (H − G)|)"
        rows.append(("share of the trace", Cell(share(found.ggn_share), found.ggn_share, note=formula)))
    return Section("gauss-newton", "Gauss-Newton part", (Facts(tuple(rows)),))


def _certificates(found: dict[str, Certificate | None]) -> Section:
    rows = []
    for part, entry in found.items():
        if entry is None:
            rows.append((Cell(part), Cell("none"), *(Cell("–") for _ in range(5))))
            continue
        rows.append(
            (
                Cell(part),
                Cell("passed", tone="good") if entry.passed else Cell("FAILED", tone="bad"),
                cell(entry.worst, 2),
                cell(entry.tolerance, 1),
                cell(entry.symmetry, 2),
                Cell(f"{entry.vectors} (seed {entry.seed})"),
                Cell(entry.against),
            )
        )
    columns = (
        *(
            Column("part", False),
            Column("result", False),
            Column("worst error"),
            Column("allowed"),
            Column("asymmetry"),
        ),
        *(Column("random vectors"), Column("against", False)),
    )
    about = (
        "The stored matrix is multiplied with random vectors x, and the results are compared with products that share no code "
        "with it: |Hx − hvp(x)| / |hvp(x)|. Asymmetry is the largest |H_ij − H_ji| inside diagonal blocks, relative to the "
        "largest entry there."
    )
    table = Table("certificates", "Certificates", columns, tuple(rows))
    return Section("certificate", "Certificate", (Text(about), table))


def _tiles(store: HessianStore, found: RunFindings) -> Section:
    records, total = store.store.records(), len(store.layout.tiles)
    held = store.store.quarantined()
    split = sum(record.split > 0 for record in records)
    seconds, written = sum(record.seconds for record in records), sum(record.written_bytes for record in records)
    attributes = store.attributes
    rows: list[tuple[str, Cell]] = [
        ("tiles done", Cell(f"{count(total - len(found.missing))} of {count(total)}")),
        ("failed for good", Cell(count(len(held)), tone="bad" if held else "plain")),
        (
            "split for memory",
            Cell(count(split), note="exact to rounding, but not the bytes of an undivided run" if split else ""),
        ),
        ("workers", Cell(count(len({record.worker for record in records})))),
        ("worker time", Cell(human_seconds(seconds), seconds)),
        ("written", Cell(human_bytes(written), float(written))),
    ]
    peak = max((record.peak_bytes for record in records), default=0)
    if peak:
        rows.append(("peak memory of a worker", Cell(human_bytes(peak), float(peak))))
    for key, name, words in (
        ("projected_flops", "operations planned", human_flops),
        ("projected_peak_bytes", "memory planned", human_bytes),
    ):
        value = attributes.get(key)
        if isinstance(value, (int, float)) and value:
            rows.append((name, Cell(words(value), float(value))))
    parts: list[Any] = [Facts(tuple(rows))]
    if held:
        shown = list(held.items())[:_MOST_TILES]
        more = f"{len(held) - len(shown)} more are left out." if len(held) > len(shown) else ""
        lines = tuple(
            (Cell(str(tile)), Cell(store.layout.tiles[tile].place if tile < total else "?"), Cell(message))
            for tile, message in shown
        )
        columns = (Column("tile"), Column("place", False), Column("error", False))
        parts.append(Table("quarantined", "Tiles that failed for good", columns, lines, more))
    return Section("tiles", "Tiles and cost", tuple(parts))


def _what(store: HessianStore) -> Section:
    attributes = store.attributes
    mark = attributes.get("fingerprint", {})
    whole = hashlib.sha256(json.dumps(mark, sort_keys=True).encode()).hexdigest()
    rows: list[tuple[str, Cell]] = [("store", Cell(store.path))]
    for name, value in (
        ("model", mark.get("model")),
        ("objective", mark.get("objective")),
        ("training mode", {True: "yes", False: "no"}.get(mark.get("training mode"))),
        ("samples", attributes.get("samples")),
        ("batches", attributes.get("batches")),
        ("parts", ", ".join(store.parts)),
        ("dtype", store.layout.dtype),
        ("method", attributes.get("method")),
        ("why", attributes.get("method_reason")),
        ("samples are", attributes.get("independence")),
        ("shared parameters", attributes.get("sharing")),
        ("weight decay", _decay(mark.get("weight decay"))),
    ):
        if value not in (None, ""):
            rows.append((name, Cell(count(value) if isinstance(value, int) else str(value))))
    rows += [
        (
            "fingerprint",
            Cell(whole[:16], title=whole, note="of model, data, objective and settings; the first 16 digits"),
        ),
        ("data", Cell(_hash(mark.get("batches")), note="hash of the hashes of all batches")),
        ("weights", Cell(_hash(mark.get("parameters")), note="hash of the hashes of all parameters")),
        ("store schema", Cell(str(attributes.get("schema", "?")))),
    ]
    rows += [(f"section {name}", Cell(text)) for name, text in sorted(store.sections.items())]
    return Section("what", "What was computed", (Facts(tuple(rows)),))


def _decay(found: object) -> str:
    if not isinstance(found, dict) or not found:
        return ""
    values = sorted({float(value) for value in found.values()})
    return f"{', '.join(number(value, 3) for value in values)} on {len(found)} parameters"


def _hash(tree: object) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]
