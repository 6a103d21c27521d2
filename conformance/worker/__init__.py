"""What runs inside an engine's own environment: standard library only, plus adapters."""
