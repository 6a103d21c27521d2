"""Conformance harness for Gemma 4.

This module and `conformance.worker` import the standard library only: they also run inside the
environments of the engines under test.
"""

__version__ = "0.1.0"
