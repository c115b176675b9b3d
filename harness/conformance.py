"""Does a method keep the contract? Runs the rules against it on small backbones of four kinds, and tells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from harness.rules import BACKBONES, RULES, Broken, Rule, Subject
from methods import Method, Unsupported


@dataclass(frozen=True)
class Finding:
    """How one rule went on one backbone: passed, or not; detail is the reason."""

    backbone: str
    rule: str
    passed: bool
    detail: str = ""


def check_method(
    method: Method, backbones: tuple[str, ...] = tuple(BACKBONES), rules: tuple[Rule, ...] = RULES
) -> Iterator[Finding]:
    """Runs the rules on every backbone. A refusal (Unsupported) is fine, apart from the plain ViT."""
    for backbone in backbones:
        subject = Subject(method, backbone)
        try:
            subject.sparse()
        except Unsupported as error:
            yield Finding(
                backbone,
                "supported or refused with a reason",
                backbone != "plain" and bool(str(error)),
                f"refused: {error}",
            )
            continue
        except Exception as error:
            yield Finding(backbone, "supported or refused with a reason", False, _told(error))
            continue
        for rule in rules:
            try:
                rule(subject)
            except Exception as error:
                yield Finding(backbone, rule.__name__.replace("_", " "), False, _told(error))
            else:
                yield Finding(backbone, rule.__name__.replace("_", " "), True)


def show_findings(label: str, findings: Iterator[Finding]) -> bool:
    """Prints a line per rule and backbone; True if all passed."""
    console, kept = Console(highlight=False), []
    table = Table("backbone", "rule", "", "detail", title=label, title_justify="left")
    for finding in findings:
        kept.append(finding)
        table.add_row(finding.backbone, finding.rule, "ok" if finding.passed else "BROKEN", finding.detail)
    console.print(table)
    broken = [finding for finding in kept if not finding.passed]
    console.print(f"{label}: {len(kept) - len(broken)} of {len(kept)} rules hold")
    for finding in broken:
        console.print(
            f"{label} on {finding.backbone} breaks the rule: {finding.rule}: {finding.detail}",
            markup=False,
            soft_wrap=True,
        )
    return not broken


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, Broken) else f"{type(error).__name__}: {text}"
