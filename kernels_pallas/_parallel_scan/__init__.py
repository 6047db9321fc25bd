"""Recurrences that are diagonal in the state; the public names are in `kernels_pallas`."""

from kernels_pallas._parallel_scan._linear_scan.api import linear_scan as linear_scan
from kernels_pallas._parallel_scan._selective_scan.api import selective_scan as selective_scan
from kernels_pallas._parallel_scan._selective_scan.api import selective_scan_step as selective_scan_step
