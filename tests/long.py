"""The tests that the whole suite leaves out: each takes minutes. `make long` runs them, and so do their names."""

LONG = (
    "tests/integration/test_goodput_runs.py",
    "tests/integration/test_growth_benchmarks.py",
    "tests/integration/test_operator_course.py",
    "tests/integration/test_sinks_of_a_run.py",
    "tests/integration/test_speed_benchmarks.py",
    "tests/integration/test_watching.py",
)
