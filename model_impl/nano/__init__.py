"""Tiny trained checkpoints and the recipes that made them.

`scripted` answers by heart: `script.load_script()` says what, `script.checkpoint_folder()` where it lies.
"""
