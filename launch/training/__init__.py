"""The surroundings of the loops of train.py and ps_worker.py, and the comparison of their runs."""
