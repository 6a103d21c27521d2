"""Modules of a decoder layer."""
