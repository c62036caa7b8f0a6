"""What this project is measured with: ``python -m benchmarks`` (docs/benchmarks.md)."""
