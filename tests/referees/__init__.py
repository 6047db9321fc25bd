"""Other people's tests of attention, turned on ours; `python -m tests.referees` counts what passes."""
