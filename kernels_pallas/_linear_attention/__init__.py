"""Linear attention: a matrix state per head, updated by every token, with decay."""
