"""Tiny trained checkpoints and the recipes that made them.

`scripted` answers by heart: `script.load_script()` says what, `script.checkpoint_folder()` where it lies.
`nano-e`, `nano-a` and `nano-d` solve problems that they have never seen: `curriculum` says what they learn,
`families` what they look like, and `train` makes them.
"""
