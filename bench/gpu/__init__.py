"""The parts of bench/gpu_suite.py, each run as a process of its own."""
