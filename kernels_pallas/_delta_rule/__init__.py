"""The delta rule: a matrix state per head, in which a token replaces what its key reads."""

from kernels_pallas._delta_rule.api import delta_rule as delta_rule
from kernels_pallas._delta_rule.api import delta_rule_step as delta_rule_step
