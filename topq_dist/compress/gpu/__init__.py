"""The engine on a device: what sparsify/ and codec/ do, by Triton, without asking the host.

`engine.py` says where it runs. Nothing but `kernels/` imports triton, and nothing here is imported
where it does not run: a machine without a GPU, or without triton, goes without.
"""
