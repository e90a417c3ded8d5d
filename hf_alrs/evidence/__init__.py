"""
The evidence: plans of several studies, run as matrices into one folder each, with one report over them.

A plan is a YAML file; `plan` reads it, `command` (`hf-alrs evidence`) runs it, `report` sets its report, and `readme` writes what
README and `results/README.md` say of the reports.
"""

from __future__ import annotations

from .plan import Plan, Study, find_plan, read_plan
from .readme import update_readme
from .report import build_evidence


__all__ = ["Plan", "Study", "build_evidence", "find_plan", "read_plan", "update_readme"]
