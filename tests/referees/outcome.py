"""What became of a referee's cases."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Outcome:
    """Names of cases.

    Attributes:
      passed: those that ours passes.
      failed: those that ours fails and the referee's own passes, with the complaint.
      failed_by_both: those that the referee's own fails as well on this machine, with the complaint about ours.
      not_applicable: those about something that ours does not offer, with the reason.
    """

    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    failed_by_both: dict[str, str] = field(default_factory=dict)
    not_applicable: dict[str, str] = field(default_factory=dict)
