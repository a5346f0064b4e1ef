"""Small real tasks that ship with the suite: for the demo, the tests and the benchmarks."""
