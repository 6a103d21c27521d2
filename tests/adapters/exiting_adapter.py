"""An adapter whose engine exits while it is imported."""

raise SystemExit("this engine needs a GPU")
