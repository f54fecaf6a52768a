"""What `make gpu-check` is made of: the plan, the runner under a budget, the journal, the pack."""
