"""What suites of kind `invariance` are judged by: one request under two configurations gives one output."""
