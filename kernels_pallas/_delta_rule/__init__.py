"""The delta rule: a matrix state per head, in which a token replaces what its key reads."""
