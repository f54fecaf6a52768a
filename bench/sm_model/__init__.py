"""One multiprocessor that replays a loop of machine code: its rates, the loop, and the replay."""
