"""Trials of the harness itself: no false alarm without a fault, and no result lost when a run is killed."""
