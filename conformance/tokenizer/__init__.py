"""The harness's own tokenizer: `tokenizer.json`, `tokenizer_config.json`, and the recipe (`build`).

It is small, but shaped like Gemma 4's: a BPE with byte fallback whose control tokens, and the plain
tokens whose ids are published, carry exactly those ids.
"""
