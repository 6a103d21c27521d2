"""One module per engine; each has `create()`, which makes its adapter."""
