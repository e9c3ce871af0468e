"""The parts of bench/gpu_suite.py. Each runs as a process of its own."""
