"""A decision as JUnit XML, which CI systems show as tests."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from flashmoe.ratchet.gate.decide import FAIL, INCONCLUSIVE, INTEGRITY, Decision, Verdict
from flashmoe.ratchet.gate.thresholds import percent
from flashmoe.ratchet.report.rows import bounds


def junit(decision: Decision) -> str:
    """FAIL is a failure, INTEGRITY an error, INCONCLUSIVE skipped. What concerns no single case is
    an error of a case called `comparable`."""
    suite = ElementTree.Element("testsuite", name="flashmoe.ratchet")
    counts = {"failures": FAIL, "skipped": INCONCLUSIVE, "errors": INTEGRITY}
    whole = decision.integrity
    for key, verdict in counts.items():
        extra = bool(whole) and key == "errors"
        suite.set(key, str(len(decision.named(verdict)) + extra))
    suite.set("tests", str(len(decision.verdicts) + bool(whole)))
    for v in decision.verdicts:
        case = ElementTree.SubElement(suite, "testcase", classname=f"ratchet.{v.kind}", name=v.name)
        tag = {FAIL: "failure", INTEGRITY: "error", INCONCLUSIVE: "skipped"}.get(v.verdict)
        if tag:
            ElementTree.SubElement(case, tag, message=_clean(_message(v)))
        elif v.change:
            ElementTree.SubElement(case, "system-out").text = _message(v)
    if whole:
        case = ElementTree.SubElement(suite, "testcase", classname="ratchet", name="comparable")
        ElementTree.SubElement(case, "error", message=_clean("; ".join(whole)))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(
        suite, encoding="unicode"
    )


def _message(v: Verdict) -> str:
    change = f"{percent(v.change.value):+.1f} % {bounds(v.change)}" if v.change else ""
    return ": ".join(filter(None, (v.verdict, change, v.reason)))


def _clean(text: str) -> str:
    """Without characters that XML cannot hold."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable())
