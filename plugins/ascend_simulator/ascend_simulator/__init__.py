"""Real torch_npu with no NPU: stand-ins for CANN's libraries, whose device memory is host memory.

Run a program on it with `ascend-sim run -- PROGRAM ARGS…`. What is measured there is no measurement of an NPU, so
whatever writes a report should ask `is_simulated()`, or look for `ASCEND_SIMULATOR` in the environment.
"""

from ascend_simulator.environment import is_simulated

__all__ = ["is_simulated"]
