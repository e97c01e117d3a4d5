"""The layer: its plan, its inputs, a step, graphs and stacks of it."""
