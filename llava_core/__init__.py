"""Train LLaVA models with one script and the same numbers on every accelerator."""
