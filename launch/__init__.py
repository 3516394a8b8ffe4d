"""The command line, launching, reports and benchmarks."""
