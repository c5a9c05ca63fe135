"""Speed and memory of raysd beside a peer or a bare PyTorch loop in the same run: `python -m benchmarks`."""
