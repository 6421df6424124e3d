"""The device code: Triton, one stage a file. Importing a module of these imports triton.

Vectors of floats come as their bit patterns (integers of the same width), positions are 64 bits
wide, and all arithmetic is rounded to nearest, once an operation, in the order that is written: the
kernels are launched with enable_fp_fusion=False.
"""
