"""Training: phases within a budget, step by step, on one process or many, and on again after an interruption."""
