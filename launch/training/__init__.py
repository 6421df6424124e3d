"""What surrounds the loops of train.py and ps_worker.py, and what compares their runs."""
