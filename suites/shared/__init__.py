"""Libraries that several suites use; they import nothing from the harness."""
