"""The library at work on real data: `python -m jaxnum tour`.

Each stop solves one problem with public names only, on data that come with scikit-learn or Python, and writes pictures
and a section of one self-contained page. Nothing is downloaded. Needs `pip install "jaxnum[tour]"`.

How to add a stop called `name`:

1. Write `jaxnum/tour/_name.py` with one function `name(*, size=...) -> Stop`. Its docstring's first line is what
   `--list` shows. Sizes are keyword arguments whose defaults are the tour's, so that the test can run it small. Import
   scikit-learn, scipy and matplotlib inside functions; draw on `jaxnum.tour.stop.figure`.
2. Return a `Stop`: a title, text (paragraphs), one sentence of finding, rows of (quantity, value) and pictures. Every
   figure in them is computed by the run.
3. Add `"name"` to `STOPS` below.
4. Write `tests/tour/test_name.py`, which runs the stop at a tiny size and checks what it claims.
"""

STOPS = ("digits", "colours", "poisson", "correlation", "language")
