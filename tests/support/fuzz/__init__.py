"""Random calls, good and hostile mixed, that replay by their seeds (run_fuzz.py).

Every call ends right or in a documented exception, and after every hostile one a correct call gives
the right bits. Three legs: the CPU backend against the float64 oracle (`cpu`), kernels on a driver
that does nothing, whose launches are compared (`driver`), and kernels on the simulated device with
hostile sequences, descales and rows (`device`).
"""
