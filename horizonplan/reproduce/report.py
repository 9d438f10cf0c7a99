"""The page of a run: the paper's claims one by one, with the verdict, the rule behind it, our figures and the pictures.

Everything in it comes out of the findings. The page holds its pictures; the tables lie beside it.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from horizonplan.reproduce.findings import FAILS, HOLDS, OURS, PARTLY, Claim, Finding
from horizonplan.training.files import write

PAPER = "Unifying Back-Propagation and Forward-Forward Algorithms through Model Predictive Control"
COLOURS = {HOLDS: "#2e7d4f", PARTLY: "#b7791f", FAILS: "#b0392b", OURS: "#5a6675"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem }
img { max-width: 100%; display: block; margin: 1rem 0 } table { border-collapse: collapse; width: 100% }
td, th { border-bottom: 1px solid #ddd; padding: .4rem .5rem; text-align: left; vertical-align: top }
.caption, .rule, .where { color: #555; font-size: .88rem } .claim { margin: 1rem 0; padding-left: .8rem }
.verdict { color: white; border-radius: .3rem; padding: .05rem .5rem; font-size: .82rem; white-space: nowrap }
"""


def write_report(folder: Path, findings: Sequence[Finding], facts: Mapping[str, str]) -> Path:
    """Write ``report.html`` into a folder where the findings' pictures and tables lie.

    Args:
        folder: of the run.
        findings: in the order of the page.
        facts: about the run, such as its scale and the machine: name and value.

    Returns:
        The page's path.
    """
    pictures = {name: (folder / name).read_bytes() for found in findings for name in found.pictures}
    path = folder / "report.html"
    write(path, page(findings, facts, pictures).encode())
    return path


def write_claims(folder: Path, findings: Sequence[Finding]) -> Path:
    """Write ``claims.md`` into a folder: the claims, verdicts and figures as a table in Markdown.

    Args:
        folder: of the run.
        findings: in the order of the table.

    Returns:
        The table's path.
    """
    rows = [
        "| " + " | ".join(_in_a_cell(text) for text in (found.name, claim.says, claim.verdict, claim.found)) + " |"
        for found in findings
        for claim in found.claims
    ]
    path = folder / "claims.md"
    write(path, "\n".join(["| where | claim | verdict | figures |", "|---|---|---|---|", *rows, ""]).encode())
    return path


def _in_a_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def page(findings: Sequence[Finding], facts: Mapping[str, str], pictures: Mapping[str, bytes]) -> str:
    """The page as HTML."""
    claims = [claim for found in findings for claim in found.claims]
    counts = Counter(claim.verdict for claim in claims)
    said = ", ".join(f"{counts[verdict]} {_verdict(verdict)}" for verdict in COLOURS if counts[verdict])
    about = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
    rows = "".join(
        f"<tr><td><a href='#{escape(found.name)}'>{escape(found.name)}</a></td><td>{escape(claim.says)}</td>"
        f"<td>{_verdict(claim.verdict)}</td></tr>"
        for found in findings
        for claim in found.claims
    )
    sections = "".join(_section(found, pictures) for found in findings)
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>The paper, "
        f"reproduced</title><style>{STYLE}</style><h1>The paper, reproduced</h1><p><em>{PAPER}</em>, its experiments "
        "run again with horizonplan. Each claim has a verdict by a rule that stands beside it and is computed with "
        f"the figures.</p><table>{about}</table><h2>Claims: {said}</h2><table>{rows}</table>{sections}</html>\n"
    )


def _verdict(verdict: str) -> str:
    return f"<span class='verdict' style='background: {COLOURS[verdict]}'>{escape(verdict)}</span>"


def _section(found: Finding, pictures: Mapping[str, bytes]) -> str:
    images = "".join(
        f"<img alt='{escape(found.title)}' src='data:image/png;base64,{base64.b64encode(pictures[name]).decode()}'>"
        for name in found.pictures
    )
    tables = ", ".join(f"<a href='{escape(name)}'>{escape(name)}</a>" for name in found.tables)
    claims = "".join(map(_claim, found.claims))
    return (
        f"<h2 id='{escape(found.name)}'>{escape(found.title)}</h2>{images}<p class='caption'>{escape(found.caption)} "
        f"Numbers: {tables}.</p>{claims}"
    )


def _claim(claim: Claim) -> str:
    return (
        f"<div class='claim' style='border-left: 4px solid {COLOURS[claim.verdict]}'>"
        f"<strong>{escape(claim.says)}</strong> <span class='where'>({escape(claim.where)})</span> "
        f"{_verdict(claim.verdict)}<br>{escape(claim.found)}<div class='rule'>Rule: {escape(claim.rule)}</div></div>"
    )
