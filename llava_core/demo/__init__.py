"""The demo: a LLaVA that reads handwritten digits, from its parts to its answers in about two minutes on one core."""
