"""Implementations under test, behind one protocol."""
