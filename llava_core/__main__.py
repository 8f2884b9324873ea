"""`python -m llava_core` and `torchrun -m llava_core`: the `llava-core` command."""

from llava_core.cli.main import main

main()
