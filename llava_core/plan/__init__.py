"""What a run will need, found by its own code on tensors without memory: nothing is loaded, computed or sent."""
