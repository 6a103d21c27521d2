"""The commands of `conformance`, one module each; `conformance.cli` puts them together."""
